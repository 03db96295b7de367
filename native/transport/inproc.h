// The link within one process: between two threads, or between two parts of one (the pump).
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#include "transport/slot_link.h"

namespace lamina {

/// What both ends of a link in one process see.
struct InprocMemory {
  Doorbell doorbells[2] = {};
  EndState states[2] = {};
  std::mutex mutex;
  std::map<uint16_t, SlotMemory> inboxes[2];
};

class InprocLink : public SlotLink {
 public:
  /// `pump`: runs the other end, which lives in the same thread. `is_pumped`: this is such an end.
  InprocLink(std::string peer, std::shared_ptr<InprocMemory> memory, int side,
             std::function<void()> pump, bool is_pumped);
  ~InprocLink() override { close(); }
  void close() override { fail("this end of the link is closed"); }
  const std::function<void()>& pump() const override { return pump_; }
  void drop_pump() { pump_ = nullptr; }

 protected:
  SlotMemory publish(uint16_t mailbox, size_t capacity_bytes) override;
  bool find(uint16_t mailbox, SlotMemory& memory) override;
  Doorbell* other_doorbell() override { return &memory_->doorbells[1 - side_]; }
  EndState* other_state() override { return &memory_->states[1 - side_]; }
  Doorbell& own_doorbell() override { return memory_->doorbells[side_]; }
  EndState& own_state() override { return memory_->states[side_]; }
  bool is_pumped() const override { return is_pumped_; }

 private:
  std::shared_ptr<InprocMemory> memory_;
  int side_;
  std::function<void()> pump_;
  bool is_pumped_;
};

/// Two ends of a link in this process; the first one's peer is `name_b`.
///
/// Without `pump_b` each end has its own thread. With it the thread of the first end also runs the
/// second: `pump_b` is called, again and again, when the first end waits for a message that is not
/// there or posts into a full mailbox. It must do what is due at the second end, where a wait for a
/// message that is not there throws DeadlineExceeded at once. What it throws comes out of the wait.
std::pair<std::shared_ptr<InprocLink>, std::shared_ptr<InprocLink>> inproc_pair(
    const std::string& name_a, const std::string& name_b, std::function<void()> pump_b);

}  // namespace lamina
