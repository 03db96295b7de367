// A fixed set of threads that run one job at a time together with the thread that starts it.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace lamina {

/// Made once per process and shared by all that compute there. Between jobs its threads wait as
/// `core/wait.h` says: a job that follows soon starts within a microsecond.
class ThreadPool {
 public:
  /// `cores`: pin thread i (0 is the caller of `run`, which is not pinned) to cores[i]; empty: none.
  explicit ThreadPool(int num_threads, std::vector<int> cores = {});
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  /// Give a pool of one thread its others. A pool that is made ahead of a fork has none: threads do
  /// not survive it. No job may run meanwhile. Throws std::logic_error for a pool that has several.
  void grow(int num_threads, const std::vector<int>& cores = {});

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  /// Call job(i) for every thread i in [0, num_threads), in parallel; the caller is thread 0.
  /// Returns when all are done. Jobs must not throw. Callers on several threads take turns.
  template <typename Job>
  void run(Job&& job) {
    if (workers_.empty()) {
      job(0);
      return;
    }
    start([](void* context, int thread) { (*static_cast<std::remove_reference_t<Job>*>(context))(thread); },
          const_cast<void*>(static_cast<const void*>(&job)));
  }

 private:
  using Call = void (*)(void*, int);

  void start(Call call, void* context);
  void work(int thread);

  std::vector<std::thread> workers_;
  std::mutex in_use_;
  Call call_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<uint32_t> generation_{0};
  std::atomic<uint32_t> num_sleeping_{0};
  std::atomic<bool> is_stopping_{false};
  alignas(64) std::atomic<int> num_running_{0};
};

/// The items [first, second) of `count` that thread `index` of `num` gets when all get equal parts.
struct Part {
  int64_t begin;
  int64_t end;
};
inline Part equal_part(int64_t count, int index, int num) {
  return {count * index / num, count * (index + 1) / num};
}

}  // namespace lamina
