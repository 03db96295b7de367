#include "transport/inproc.h"

namespace lamina {

InprocLink::InprocLink(std::string peer, std::shared_ptr<InprocMemory> memory, int side,
                       std::function<void()> pump, bool is_pumped)
    : SlotLink(std::move(peer), /*is_shared=*/false, Pacer::kYieldSeconds),
      memory_(std::move(memory)),
      side_(side),
      pump_(std::move(pump)),
      is_pumped_(is_pumped) {}

SlotMemory InprocLink::publish(uint16_t mailbox, size_t capacity_bytes) {
  SlotMemory memory{mailbox, capacity_bytes,
                    Memory::make_private(SlotMemory::num_bytes(capacity_bytes))};
  std::lock_guard lock(memory_->mutex);
  memory_->inboxes[side_][mailbox] = memory;
  return memory;
}

bool InprocLink::find(uint16_t mailbox, SlotMemory& memory) {
  std::lock_guard lock(memory_->mutex);
  const auto& inboxes = memory_->inboxes[1 - side_];
  const auto found = inboxes.find(mailbox);
  if (found == inboxes.end()) return false;
  memory = found->second;
  return true;
}

std::pair<std::shared_ptr<InprocLink>, std::shared_ptr<InprocLink>> inproc_pair(
    const std::string& name_a, const std::string& name_b, std::function<void()> pump_b) {
  auto memory = std::make_shared<InprocMemory>();
  const bool is_pumped = static_cast<bool>(pump_b);
  auto a = std::make_shared<InprocLink>(name_b, memory, 0, std::move(pump_b), false);
  auto b = std::make_shared<InprocLink>(name_a, memory, 1, nullptr, is_pumped);
  return {a, b};
}

}  // namespace lamina
