// One mailbox in memory that its two ends share: two slots for payloads, and who may touch which.
//
//   line 0    written by the sender: how many messages were posted; number, length and slot of the
//             last two
//   line 1    written by the receiver: how often each slot was given back
//   slot 0    `capacity_bytes`, aligned to 64 bytes
//   slot 1
//
// The slots are used in turn; while the receiver still views one, the other is used again.
// Everything that one end reads of the other's line is checked, so that a peer that misbehaves
// cannot make this process touch other memory than the mailbox.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "transport/link.h"
#include "transport/memory.h"

namespace lamina {

constexpr int kNumSlots = 2;
constexpr size_t kSlotAlignment = 64;

/// Number, length and place of a message.
struct SlotMessage {
  uint64_t seq;
  uint64_t num_bytes;
  uint64_t slot;
};

struct SlotHeader {
  // Pairs of lines are fetched together by some cores: two lines between the ends.
  alignas(128) std::atomic<uint64_t> num_posted;
  SlotMessage messages[kNumSlots];
  alignas(128) std::atomic<uint64_t> num_freed[kNumSlots];
};
static_assert(std::atomic<uint64_t>::is_always_lock_free);

/// The memory of one mailbox and its layout.
struct SlotMemory {
  uint16_t mailbox = 0;
  size_t capacity_bytes = 0;
  std::shared_ptr<Memory> memory;

  /// Bytes of memory for a mailbox of this capacity.
  static size_t num_bytes(size_t capacity_bytes);

  SlotHeader& header() const { return *reinterpret_cast<SlotHeader*>(memory->data()); }
  std::byte* slot(uint64_t index) const;
};

/// What the sender of a mailbox does to its memory. Never blocks.
class SlotWriter {
 public:
  explicit SlotWriter(SlotMemory memory) : memory_(std::move(memory)) {}

  const SlotMemory& memory() const { return memory_; }

  bool has_room() const { return is_free(0) || is_free(1); }

  /// Where the next message goes; needs `has_room`. The same until `publish`, even if the receiver
  /// gives the other slot back meanwhile.
  std::byte* next_slot() { return memory_.slot(choose()); }

  /// Throws ProtocolMismatch unless the message may be the next.
  void check(uint64_t seq, size_t num_bytes, const std::string& peer) const;

  /// The message lies in `next_slot()`. One that `check` refuses may be published without a
  /// payload: it tells the receiver what is wrong.
  void publish(uint64_t seq, size_t num_bytes);

 private:
  bool is_free(uint64_t slot) const {
    return memory_.header().num_freed[slot].load(std::memory_order_acquire) == num_used_[slot];
  }
  uint64_t choose() {
    if (!chosen_) chosen_ = is_free(turn_) ? turn_ : 1 - turn_;
    return *chosen_;
  }

  SlotMemory memory_;
  uint64_t num_used_[kNumSlots] = {0, 0};
  uint64_t turn_ = 0;
  std::optional<uint64_t> chosen_;
  uint64_t num_posted_ = 0;
  uint64_t last_seq_ = 0;
};

/// What the receiver of a mailbox does to its memory. Never blocks.
class SlotReader {
 public:
  SlotReader(SlotMemory memory, const std::string& peer)
      : memory_(std::move(memory)), peer_(peer) {}

  const SlotMemory& memory() const { return memory_; }

  /// The view given out before may be overwritten from now on; true if there was one.
  bool end_view();

  /// Whether `take(seq)` would return or throw instead of nothing being there. Discards messages
  /// with smaller numbers and adds to `num_freed` how many slots that gave back.
  /// Throws ProtocolMismatch if a message that came must not come.
  bool is_due(uint64_t seq, int& num_freed);

  /// Whether the first message that was not discarded is number `seq`. Throws as `is_due`.
  bool holds(uint64_t seq);

  /// The payload of message `seq`, once `is_due`. Throws ProtocolMismatch if it can no longer come
  /// or has another length than `num_bytes`.
  std::span<const std::byte> take(uint64_t seq, std::optional<size_t> num_bytes);

 private:
  void look();
  void give_back(uint64_t slot);
  [[noreturn]] void mismatch(const std::string& reason) const;

  SlotMemory memory_;
  std::string peer_;
  SlotMessage arrived_[kNumSlots] = {};
  uint64_t num_arrived_ = 0;
  uint64_t num_read_ = 0;
  uint64_t last_seq_ = 0;
  uint64_t num_given_back_[kNumSlots] = {0, 0};
  std::optional<uint64_t> viewed_slot_;
};

/// Throws ProtocolMismatch: what is said of a message larger than the mailbox, or out of turn.
void check_message(uint16_t mailbox, size_t capacity_bytes, uint64_t seq, uint64_t num_bytes,
                   bool is_first, uint64_t last_seq, const std::string& peer);

/// Throws std::invalid_argument unless `mailbox` is a number that a new mailbox may have.
void check_number(uint16_t mailbox, bool exists);

/// An inbox whose messages lie in a `SlotMemory`.
class SlotInbox : public Inbox {
 public:
  explicit SlotInbox(SlotReader reader) : reader_(std::move(reader)) {}
  size_t capacity_bytes() const override { return reader_.memory().capacity_bytes; }
  const SlotMemory& memory() const { return reader_.memory(); }
  bool holds(uint64_t seq) override { return reader_.holds(seq); }

 protected:
  SlotReader reader_;
};

}  // namespace lamina
