#include "transport/faulty.h"

#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <thread>

#include "transport/memory.h"
#include "transport/slots.h"

namespace lamina {

namespace {

void post(Outbox& outbox, uint64_t seq, const std::byte* payload, size_t num_bytes,
          double deadline) {
  std::byte* slot = outbox.reserve(seq, num_bytes, deadline);
  if (num_bytes != 0) std::memcpy(slot, payload, num_bytes);
  outbox.commit(deadline);
}

}  // namespace

/// Messages that a fault is due for are written into memory of its own first.
class FaultyOutbox : public Outbox {
 public:
  FaultyOutbox(FaultyLink& link, Outbox& outbox, uint16_t mailbox)
      : link_(link),
        outbox_(outbox),
        mailbox_(mailbox),
        memory_(Memory::make_private(outbox.capacity_bytes() + kSlotAlignment)) {}

  size_t capacity_bytes() const override { return outbox_.capacity_bytes(); }
  bool has_room() override { return outbox_.has_room(); }

  std::byte* reserve(uint64_t seq, size_t num_bytes, double deadline) override {
    fault_ = link_.due(mailbox_);
    if (!fault_ || num_bytes > capacity_bytes()) {
      fault_.reset();
      return outbox_.reserve(seq, num_bytes, deadline);
    }
    seq_ = seq;
    num_bytes_ = num_bytes;
    return memory_->data();
  }

  void commit(double deadline) override {
    if (!fault_) {
      outbox_.commit(deadline);
      link_.post_held(deadline);
      return;
    }
    const std::byte* payload = memory_->data();
    switch (fault_->kind) {
      case FaultKind::drop:
        return;
      case FaultKind::reorder:
        if (!link_.held_) {
          link_.held_.emplace(
              FaultyLink::Held{outbox_, seq_, std::vector(payload, payload + num_bytes_)});
          return;
        }
        break;
      case FaultKind::truncate:
        num_bytes_ /= 2;
        break;
      case FaultKind::close:
        link_.close();
        break;
      case FaultKind::kill:
        kill(getpid(), SIGKILL);
        break;
      case FaultKind::delay:
        std::this_thread::sleep_for(std::chrono::duration<double>(fault_->delay_s));
        break;
    }
    post(outbox_, seq_, payload, num_bytes_, deadline);
    link_.post_held(deadline);
  }

 private:
  FaultyLink& link_;
  Outbox& outbox_;
  uint16_t mailbox_;
  std::shared_ptr<Memory> memory_;
  std::optional<Fault> fault_;
  uint64_t seq_ = 0;
  size_t num_bytes_ = 0;
};

FaultyLink::FaultyLink(std::shared_ptr<Link> link) : link_(std::move(link)) {}

FaultyLink::~FaultyLink() = default;

Outbox& FaultyLink::outbox(uint16_t mailbox, size_t capacity_bytes) {
  Outbox& inner = link_->outbox(mailbox, capacity_bytes);
  return *(outboxes_[mailbox] = std::make_unique<FaultyOutbox>(*this, inner, mailbox));
}

void FaultyLink::inject(const Fault& fault) {
  std::lock_guard lock(mutex_);
  faults_.push_back({fault});
}

void FaultyLink::clear() {
  std::lock_guard lock(mutex_);
  faults_.clear();
}

std::optional<Fault> FaultyLink::due(uint16_t mailbox) {
  std::lock_guard lock(mutex_);
  std::optional<Fault> first;
  for (Counted& counted : faults_) {
    const Fault& fault = counted.fault;
    if (fault.mailbox && *fault.mailbox != mailbox) continue;
    const int64_t position = counted.num_seen++ - fault.after;
    const bool is_due = position >= 0 && (!fault.count || position < *fault.count);
    if (is_due && !first) first = fault;
  }
  return first;
}

void FaultyLink::post_held(double deadline) {
  if (!held_) return;
  Held held = std::move(*held_);
  held_.reset();
  post(held.outbox, held.seq, held.payload.data(), held.payload.size(), deadline);
}

}  // namespace lamina
