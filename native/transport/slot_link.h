// A link whose two ends map the same memory: between threads (inproc.h) and processes (shm.h).
//
// A message is written into the receiver's slot and nothing else moves. A wait looks, yields, and
// then sleeps on its end's bell, which the other end rings only while somebody sleeps; so neither
// end makes a system call as long as both are quick.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "core/wait.h"
#include "transport/failure.h"
#include "transport/link.h"
#include "transport/slots.h"

namespace lamina {

/// What one end tells the other apart from messages; written by its owner but for `num_rings`.
struct alignas(128) Bell {
  std::atomic<uint32_t> num_rings;
  std::atomic<uint32_t> is_sleeping;
  std::atomic<uint32_t> is_closed;
};

class SlotOutbox;
class SlotLinkInbox;

class SlotLink : public Link {
 public:
  ~SlotLink() override;
  const std::string& peer() const override { return peer_; }
  Outbox& outbox(uint16_t mailbox, size_t capacity_bytes) override;
  Inbox& inbox(uint16_t mailbox, size_t capacity_bytes) override;
  size_t wait_any(std::span<const Awaited> awaited, double deadline) override;
  void fail(const std::string& reason) override;

 protected:
  friend class SlotOutbox;
  friend class SlotLinkInbox;

  /// `is_shared`: the bells lie in memory of two processes. `yield_s`: before a wait sleeps.
  SlotLink(std::string peer, bool is_shared, double yield_s);

  /// Make the memory of an inbox and let the other end know of it.
  virtual SlotMemory publish(uint16_t mailbox, size_t capacity_bytes) = 0;

  /// The memory of the other end's inbox; false while it has made none.
  virtual bool find(uint16_t mailbox, SlotMemory& memory) = 0;

  /// The other end's bell; null while it is unknown.
  virtual Bell* other_bell() = 0;
  virtual Bell& own_bell() = 0;

  /// Whether the other end's process is gone. May cost a system call.
  virtual bool is_peer_gone() { return false; }

  /// Let the other end see that this one closed or failed.
  virtual void hang_up();

  /// Runs the other end, where both live in one thread; empty: a wait is one for another thread.
  virtual const std::function<void()>& pump() const;

  /// Whether the other end runs only while it pumps this one: a wait cannot become true.
  virtual bool is_pumped() const { return false; }

  /// Tell the other end that a message or room is there.
  void ring();
  void wake_self();

  /// Fail this end with `error` and hang up.
  void broken(const TransportFailure& error);

  /// Throw what this end failed with, or PeerLost if the other end closed.
  void check();
  bool is_peer_closed();

  Failure failure_;

 private:
  template <typename Ready, typename Describe>
  void until(const Ready& ready, const Describe& what, double deadline);

  template <typename Ready>
  void sleep(const Ready& ready, double deadline);

  [[noreturn]] void throw_broken(const TransportFailure& error);
  [[noreturn]] void peer_lost();

  std::string peer_;
  bool is_shared_;
  double yield_s_;
  std::map<uint16_t, std::unique_ptr<SlotOutbox>> outboxes_;
  std::map<uint16_t, std::unique_ptr<SlotLinkInbox>> inboxes_;
};

}  // namespace lamina
