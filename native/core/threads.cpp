#include "core/threads.h"

#include <pthread.h>
#include <sched.h>

#include <stdexcept>

#include "core/wait.h"

namespace lamina {
namespace {

constexpr double kSleepSeconds = 1.0;

void pin(std::thread& thread, int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  if (pthread_setaffinity_np(thread.native_handle(), sizeof set, &set) != 0) {
    throw std::invalid_argument("core " + std::to_string(core) + " cannot be used by this process");
  }
}

}  // namespace

ThreadPool::ThreadPool(int num_threads, std::vector<int> cores) { grow(num_threads, cores); }

void ThreadPool::grow(int num_threads, const std::vector<int>& cores) {
  if (!workers_.empty()) throw std::logic_error("this pool has its threads already");
  if (num_threads < 1) throw std::invalid_argument("a thread pool has at least one thread");
  if (!cores.empty() && static_cast<int>(cores.size()) < num_threads) {
    throw std::invalid_argument("give a core for each of the " + std::to_string(num_threads) +
                                " threads");
  }
  workers_.reserve(num_threads - 1);
  for (int thread = 1; thread < num_threads; ++thread) {
    workers_.emplace_back([this, thread] { work(thread); });
    if (!cores.empty()) pin(workers_.back(), cores[thread]);
  }
}

ThreadPool::~ThreadPool() {
  is_stopping_ = true;
  generation_.fetch_add(1);
  futex_wake(generation_, false);
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::start(Call call, void* context) {
  const std::lock_guard lock(in_use_);
  call_ = call;
  context_ = context;
  num_running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  generation_.fetch_add(1);  // sequentially consistent, as is the look at num_sleeping_ below
  if (num_sleeping_.load() != 0) futex_wake(generation_, false);
  call(context, 0);
  Pacer pacer;
  while (num_running_.load(std::memory_order_acquire) != 0) pacer.step();
}

void ThreadPool::work(int thread) {
  uint32_t seen = 0;
  while (true) {
    Pacer pacer;
    while (generation_.load(std::memory_order_acquire) == seen) {
      if (!pacer.step()) continue;
      num_sleeping_.fetch_add(1);
      futex_wait(generation_, seen, kSleepSeconds, false);
      num_sleeping_.fetch_sub(1);
    }
    ++seen;
    if (is_stopping_) return;
    call_(context_, thread);
    num_running_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace lamina
