// How a link remembers that it failed: the first error stays, and every later call throws it.
#pragma once

#include <atomic>
#include <mutex>
#include <optional>

#include "transport/link.h"

namespace lamina {

/// Any thread may set it.
class Failure {
 public:
  bool is_set() const { return is_set_.load(std::memory_order_acquire); }

  /// Fail with `error` unless it failed before; true if this was the first.
  bool set(const TransportFailure& error) {
    std::lock_guard lock(mutex_);
    if (error_) return false;
    error_ = error;
    is_set_.store(true, std::memory_order_release);
    return true;
  }

  void check() const {
    if (is_set()) throw TransportFailure(*error_);
  }

 private:
  std::mutex mutex_;
  std::optional<TransportFailure> error_;
  std::atomic<bool> is_set_{false};
};

}  // namespace lamina
