// How a thread waits for memory that another thread or process will change.
//
// On the machines this is made for, waking a sleeping core costs 20 us and more, giving the core to
// another runnable thread (sched_yield) 0.5 us. A wait therefore looks a few times, then yields
// for a while, so that whoever needs this core gets it, and sleeps when the wait has become long. It
// also sleeps when somebody else computes on this core: the scheduler lets one that yields again and
// again wait for long, but gives one that is woken its turn soon. Processes that outnumber the cores
// thus take turns instead of starving each other.
#pragma once

#include <atomic>
#include <cstdint>

namespace lamina {

/// Seconds of CLOCK_MONOTONIC, the clock of Python's `time.monotonic()`: deadlines are its values.
double monotonic_s();

/// Tells the core that this is a spin loop.
inline void cpu_relax() {
#if LAMINA_X86
  __builtin_ia32_pause();
#endif
}

/// Give the core to another runnable thread, if there is one.
void yield_core();

/// Sleep until `word` is no longer `seen`, somebody calls `futex_wake`, or `timeout_s` has passed.
/// `shared`: the word lies in memory that several processes map. May return early.
void futex_wait(const std::atomic<uint32_t>& word, uint32_t seen, double timeout_s, bool shared);
void futex_wake(const std::atomic<uint32_t>& word, bool shared);

/// Paces one wait: call `step()` after each look that found nothing; it relaxes or yields and says
/// whether the caller should sleep now (futex, poll): the wait is long, or the core is in demand.
class Pacer {
 public:
  explicit Pacer(double yield_s = kYieldSeconds) : yield_s_(yield_s) {}

  bool step();

  static constexpr double kYieldSeconds = 2e-3;

 private:
  static constexpr int kSpins = 64;
  /// A yield that took longer has let somebody compute.
  static constexpr double kBusyCoreSeconds = 100e-6;
  int num_steps_ = 0;
  double yield_s_;
  double yielded_at_ = 0.0;
  double sleep_at_ = 0.0;
};

}  // namespace lamina
