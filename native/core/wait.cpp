#include "core/wait.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>

namespace lamina {

double monotonic_s() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

void yield_core() { sched_yield(); }

void futex_wait(const std::atomic<uint32_t>& word, uint32_t seen, double timeout_s, bool shared) {
  if (timeout_s <= 0.0) return;
  timespec timeout;
  timeout.tv_sec = static_cast<time_t>(timeout_s);
  timeout.tv_nsec = static_cast<long>((timeout_s - static_cast<double>(timeout.tv_sec)) * 1e9);
  syscall(SYS_futex, &word, shared ? FUTEX_WAIT : FUTEX_WAIT_PRIVATE, seen, &timeout, nullptr, 0);
}

void futex_wake(const std::atomic<uint32_t>& word, bool shared) {
  syscall(SYS_futex, &word, shared ? FUTEX_WAKE : FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

bool Pacer::step() {
  if (num_steps_ < kSpins) {
    ++num_steps_;
    cpu_relax();
    return false;
  }
  if (sleep_at_ == 0.0) {
    yielded_at_ = monotonic_s();
    sleep_at_ = yielded_at_ + yield_s_;
  }
  if (yielded_at_ >= sleep_at_) return true;
  yield_core();
  const double now = monotonic_s();
  if (now - yielded_at_ > kBusyCoreSeconds) sleep_at_ = now;
  yielded_at_ = now;
  return false;
}

}  // namespace lamina
