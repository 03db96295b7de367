// The mailboxes of a tcp link.
#pragma once

#include "transport/tcp.h"

namespace lamina {

/// One send buffer with room for the frame's header in front of the payload. `reserve` never blocks:
/// `commit` returns when the system has taken the whole message.
class TcpOutbox : public Outbox {
 public:
  TcpOutbox(TcpLink& link, uint16_t mailbox, size_t capacity_bytes)
      : link_(link),
        mailbox_(mailbox),
        capacity_bytes_(capacity_bytes),
        memory_(Memory::make_private(kSlotAlignment + capacity_bytes)) {}

  size_t capacity_bytes() const override { return capacity_bytes_; }

  /// Of the receiver's slots this side knows nothing: whether the system takes a small message.
  bool has_room() override { return link_.can_send(); }
  std::byte* reserve(uint64_t seq, size_t num_bytes, double deadline) override;
  void commit(double deadline) override;

 private:
  TcpLink& link_;
  uint16_t mailbox_;
  size_t capacity_bytes_;
  std::shared_ptr<Memory> memory_;
  FrameHeader header_ = {};
};

class TcpInbox : public SlotInbox {
 public:
  TcpInbox(TcpLink& link, SlotMemory memory, const std::string& peer)
      : SlotInbox(SlotReader(memory, peer)), writer(memory), link_(link) {}

  std::span<const std::byte> wait(uint64_t seq, double deadline,
                                  std::optional<size_t> num_bytes) override;
  bool holds(uint64_t seq) override;
  bool is_due(uint64_t seq) override;
  Source& source() override { return link_; }

  /// Takes the messages in from the connection.
  SlotWriter writer;

  /// Payload of the last message that came.
  size_t last_num_bytes = 0;

 private:
  TcpLink& link_;
};

}  // namespace lamina
