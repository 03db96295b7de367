// A link whose two ends map the same memory: between threads (inproc.h) and processes (shm.h).
//
// A message is written into the receiver's slot and nothing else moves. A wait looks, yields, and
// then sleeps on its end's doorbell, which the other end rings only while somebody sleeps; so neither
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
#include "transport/source.h"

namespace lamina {

/// What one end tells the other apart from messages.
struct alignas(128) EndState {
  std::atomic<uint32_t> is_closed;
};

class SlotOutbox;
class SlotLinkInbox;

class SlotLink : public Link, public Source {
 public:
  ~SlotLink() override;
  const std::string& peer() const override { return peer_; }
  Outbox& outbox(uint16_t mailbox, size_t capacity_bytes) override;
  Inbox& inbox(uint16_t mailbox, size_t capacity_bytes) override;
  void fail(const std::string& reason) override;

  size_t wait_any(std::span<const Awaited> awaited, double deadline) override;
  double yield_s() const override { return yield_s_; }
  void check_failure() const override { failure_.check(); }
  void broken(const TransportFailure& error) override;
  bool receive(Inbox*) override { return false; }
  bool is_peer_gone(bool is_thorough) override { return is_peer_closed(); }
  Doorbell* doorbell() override { return nullptr; }
  pollfd polled(std::unique_lock<std::mutex>&) override { return {-1, 0, 0}; }

 protected:
  friend class SlotOutbox;
  friend class SlotLinkInbox;

  /// `is_shared`: the bells lie in memory of several processes. `yield_s`: before a wait sleeps.
  SlotLink(std::string peer, bool is_shared, double yield_s);

  /// Make the memory of an inbox and let the other end know of it.
  virtual SlotMemory publish(uint16_t mailbox, size_t capacity_bytes) = 0;

  /// The memory of the other end's inbox; false while it has made none.
  virtual bool find(uint16_t mailbox, SlotMemory& memory) = 0;

  /// Of the other end; null while they are unknown.
  virtual Doorbell* other_doorbell() = 0;
  virtual EndState* other_state() = 0;
  virtual Doorbell& own_doorbell() = 0;
  virtual EndState& own_state() = 0;

  /// Let the other end see that this one closed or failed.
  virtual void hang_up();

  /// Runs the other end, where both live in one thread; empty: a wait is one for another thread.
  virtual const std::function<void()>& pump() const;

  /// Whether the other end runs only while it pumps this one: a wait cannot become true.
  virtual bool is_pumped() const { return false; }

  /// Tell the other end that a message or room is there.
  void ring();
  void wake_self();

  /// Throw what this end failed with, or PeerLost if the other end closed.
  void check();
  bool is_peer_closed();

  Failure failure_;

 private:
  template <typename Ready, typename Describe>
  void until(const Ready& ready, const Describe& what, double deadline);

  template <typename Ready>
  void sleep(const Ready& ready, double deadline);

  [[noreturn]] void peer_lost();

  std::string peer_;
  bool is_shared_;
  double yield_s_;
  std::map<uint16_t, std::unique_ptr<SlotOutbox>> outboxes_;
  std::map<uint16_t, std::unique_ptr<SlotLinkInbox>> inboxes_;
};

}  // namespace lamina
