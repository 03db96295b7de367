// What a wait sees of a connection: whether something came, whether the peer is gone, and how to sleep
// until that changes. A link is one; `WaitSet` (wait_any.h) watches several.
#pragma once

#include <poll.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <span>
#include <string>

#include "core/wait.h"
#include "transport/link.h"

namespace lamina {

/// Wakes those who wait for memory that others write: whoever wrote rings it. Written by its owner,
/// but for `num_rings`.
struct alignas(128) Doorbell {
  std::atomic<uint32_t> num_rings;
  std::atomic<uint32_t> num_sleeping;

  /// `is_shared`: the bell lies in memory of several processes.
  void ring(bool is_shared);
  void ring_if_heard(bool is_shared);

  /// Sleep until it rings or `timeout_s` has passed, unless `is_awake()` by then. Others must change
  /// what `is_awake` looks at before they ring.
  template <typename IsAwake>
  void sleep(const IsAwake& is_awake, double timeout_s, bool is_shared);
};

class Source {
 public:
  virtual ~Source() = default;
  virtual const std::string& peer() const = 0;

  /// Wait for the first of several messages of this connection (as `WaitSet::wait`).
  virtual size_t wait_any(std::span<const Awaited> awaited, double deadline) = 0;

  // For waits that watch several connections:

  /// How long to look and yield before sleeping.
  virtual double yield_s() const = 0;

  /// Throw what the link failed with, if it did.
  virtual void check_failure() const = 0;

  /// Fail the link with `error`, unless it failed before.
  virtual void broken(const TransportFailure& error) = 0;

  /// Fail the link and throw what it failed with first.
  [[noreturn]] void throw_broken(const TransportFailure& error) {
    broken(error);
    check_failure();
    throw error;
  }

  /// Take in some of what has come; true if there was anything. `expected`: the mailbox that it is
  /// probably for; may be null. Never blocks.
  virtual bool receive(Inbox* expected) = 0;

  /// Whether nothing more can come. `is_thorough`: may cost a system call.
  virtual bool is_peer_gone(bool is_thorough) = 0;

  /// How that is said.
  virtual std::string loss() const { return "closed the link or died"; }

  /// What is rung when something changes; null if `polled` tells.
  virtual Doorbell* doorbell() = 0;

  /// What to poll for, with `lock` keeping the descriptor open; -1: nothing.
  virtual pollfd polled(std::unique_lock<std::mutex>& lock) = 0;
};

template <typename IsAwake>
void Doorbell::sleep(const IsAwake& is_awake, double timeout_s, bool is_shared) {
  // Whoever changes something looks at `num_sleeping` afterwards, we look for changes after we
  // raised it: one of us sees the other.
  num_sleeping.fetch_add(1, std::memory_order_seq_cst);
  const uint32_t seen = num_rings.load(std::memory_order_seq_cst);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  try {
    if (!is_awake()) futex_wait(num_rings, seen, timeout_s, is_shared);
  } catch (...) {
    num_sleeping.fetch_sub(1, std::memory_order_relaxed);
    throw;
  }
  num_sleeping.fetch_sub(1, std::memory_order_relaxed);
}

}  // namespace lamina
