#include "transport/slots.h"

#include <stdexcept>

namespace lamina {

namespace {

size_t aligned(size_t num_bytes) {
  return (num_bytes + kSlotAlignment - 1) / kSlotAlignment * kSlotAlignment;
}

}  // namespace

size_t SlotMemory::num_bytes(size_t capacity_bytes) {
  return sizeof(SlotHeader) + kNumSlots * aligned(capacity_bytes);
}

std::byte* SlotMemory::slot(uint64_t index) const {
  return memory->data() + sizeof(SlotHeader) + index * aligned(capacity_bytes);
}

void check_message(uint16_t mailbox, size_t capacity_bytes, uint64_t seq, uint64_t num_bytes,
                   bool is_first, uint64_t last_seq, const std::string& peer) {
  using std::to_string;
  if (num_bytes > capacity_bytes) {
    throw TransportFailure(TransportFailure::Kind::protocol,
                           "message " + to_string(seq) + " of mailbox " + to_string(mailbox) +
                               " has " + to_string(num_bytes) + " bytes, more than the mailbox's " +
                               to_string(capacity_bytes) +
                               "; both sides must agree on the capacities",
                           peer);
  }
  if (!is_first && seq <= last_seq) {
    throw TransportFailure(TransportFailure::Kind::protocol,
                           "mailbox " + to_string(mailbox) + " got message " + to_string(seq) +
                               " after " + to_string(last_seq) + "; numbers must increase",
                           peer);
  }
}

void check_number(uint16_t mailbox, bool exists) {
  if (mailbox == 0) throw std::invalid_argument("mailboxes are numbered from 1");
  if (exists) {
    throw std::invalid_argument("mailbox " + std::to_string(mailbox) + " exists already");
  }
}

void SlotWriter::check(uint64_t seq, size_t num_bytes, const std::string& peer) const {
  check_message(memory_.mailbox, memory_.capacity_bytes, seq, num_bytes, num_posted_ == 0,
                last_seq_, peer);
}

void SlotWriter::publish(uint64_t seq, size_t num_bytes) {
  const uint64_t slot = choose();
  chosen_.reset();
  SlotHeader& header = memory_.header();
  // The place of the message two before: it was read, or its slot would not be free.
  header.messages[num_posted_ % kNumSlots] = {seq, num_bytes, slot};
  ++num_used_[slot];
  turn_ = 1 - slot;
  last_seq_ = seq;
  header.num_posted.store(++num_posted_, std::memory_order_release);
}

void SlotReader::mismatch(const std::string& reason) const {
  throw TransportFailure(TransportFailure::Kind::protocol, reason, peer_);
}

bool SlotReader::end_view() {
  if (!viewed_slot_) return false;
  give_back(*viewed_slot_);
  viewed_slot_.reset();
  return true;
}

void SlotReader::give_back(uint64_t slot) {
  memory_.header().num_freed[slot].store(++num_given_back_[slot], std::memory_order_release);
}

void SlotReader::look() {
  const SlotHeader& header = memory_.header();
  const uint64_t num_posted = header.num_posted.load(std::memory_order_acquire);
  if (num_posted - num_read_ > kNumSlots) {
    mismatch("wrote nonsense into mailbox " + std::to_string(memory_.mailbox));
  }
  while (num_arrived_ != num_posted) {
    const SlotMessage message = header.messages[num_arrived_ % kNumSlots];
    check_message(memory_.mailbox, memory_.capacity_bytes, message.seq, message.num_bytes,
                  num_arrived_ == 0, last_seq_, peer_);
    if (message.slot >= kNumSlots) {
      mismatch("wrote nonsense into mailbox " + std::to_string(memory_.mailbox));
    }
    arrived_[num_arrived_++ % kNumSlots] = message;
    last_seq_ = message.seq;
  }
}

bool SlotReader::is_due(uint64_t seq, int& num_freed) {
  look();
  while (num_read_ != num_arrived_) {
    const SlotMessage& front = arrived_[num_read_ % kNumSlots];
    if (front.seq >= seq) return true;
    give_back(front.slot);
    ++num_read_;
    ++num_freed;
    look();
  }
  return num_arrived_ != 0 && seq <= last_seq_;
}

bool SlotReader::holds(uint64_t seq) {
  look();
  return num_read_ != num_arrived_ && arrived_[num_read_ % kNumSlots].seq == seq;
}

std::span<const std::byte> SlotReader::take(uint64_t seq, std::optional<size_t> num_bytes) {
  const auto name = [&] {
    return "message " + std::to_string(seq) + " of mailbox " + std::to_string(memory_.mailbox);
  };
  const SlotMessage& front = arrived_[num_read_ % kNumSlots];
  if (num_read_ == num_arrived_ || front.seq != seq) {
    mismatch(name() + " can no longer come, " + std::to_string(last_seq_) +
             " is already here; do both sides run the same plan?");
  }
  if (num_bytes && *num_bytes != front.num_bytes) {
    mismatch(name() + " has " + std::to_string(front.num_bytes) + " bytes, " +
             std::to_string(*num_bytes) + " were expected; do both sides run the same plan?");
  }
  ++num_read_;
  viewed_slot_ = front.slot;
  return {memory_.slot(front.slot), front.num_bytes};
}

}  // namespace lamina
