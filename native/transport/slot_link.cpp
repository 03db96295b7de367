#include "transport/slot_link.h"

#include <algorithm>

namespace lamina {

namespace {

using Kind = TransportFailure::Kind;

/// Longest sleep without looking whether the other process still lives.
constexpr double kLifelineSeconds = 0.01;

}  // namespace

class SlotOutbox : public Outbox {
 public:
  SlotOutbox(SlotLink& link, uint16_t mailbox, size_t capacity_bytes)
      : link_(link), mailbox_(mailbox), capacity_bytes_(capacity_bytes) {}

  size_t capacity_bytes() const override { return capacity_bytes_; }

  bool has_room() override {
    if (!writer_) {
      SlotMemory memory;
      if (!link_.find(mailbox_, memory)) return false;
      writer_ = std::make_unique<SlotWriter>(std::move(memory));
    }
    return writer_->has_room();
  }

  std::byte* reserve(uint64_t seq, size_t num_bytes, double deadline) override {
    using std::to_string;
    link_.check();
    if (num_bytes > capacity_bytes_) {
      link_.throw_broken({Kind::protocol,
                          "message " + to_string(seq) + " has " + to_string(num_bytes) +
                              " bytes, more than the " + to_string(capacity_bytes_) +
                              " of mailbox " + to_string(mailbox_),
                          link_.peer_});
    }
    try {
      link_.until([this] { return has_room(); },
                  [&] {
                    return "did not take message " + to_string(seq) + " of mailbox " +
                           to_string(mailbox_);
                  },
                  deadline);
    } catch (const TransportFailure& failure) {
      if (failure.kind == Kind::deadline) {
        link_.fail("given up: " + failure.peer + ": " + failure.what());
      }
      throw;
    }
    try {
      writer_->check(seq, num_bytes, link_.peer_);
    } catch (const TransportFailure& failure) {
      writer_->publish(seq, num_bytes);
      link_.throw_broken(failure);
    }
    seq_ = seq;
    num_bytes_ = num_bytes;
    return writer_->next_slot();
  }

  void commit(double) override {
    link_.failure_.check();
    writer_->publish(seq_, num_bytes_);
    link_.ring();
  }

 private:
  SlotLink& link_;
  uint16_t mailbox_;
  size_t capacity_bytes_;
  std::unique_ptr<SlotWriter> writer_;
  uint64_t seq_ = 0;
  size_t num_bytes_ = 0;
};

class SlotLinkInbox : public SlotInbox {
 public:
  SlotLinkInbox(SlotLink& link, SlotReader reader) : SlotInbox(std::move(reader)), link_(link) {}

  std::span<const std::byte> wait(uint64_t seq, double deadline,
                                  std::optional<size_t> num_bytes) override {
    link_.failure_.check();
    if (reader_.end_view()) link_.ring();
    try {
      link_.until([&] { return is_due(seq); },
                  [&] {
                    return "did not post message " + std::to_string(seq) + " of mailbox " +
                           std::to_string(reader_.memory().mailbox);
                  },
                  deadline);
      return reader_.take(seq, num_bytes);
    } catch (const TransportFailure& failure) {
      if (failure.kind == Kind::protocol) link_.throw_broken(failure);
      throw;
    }
  }

  Source& source() override { return link_; }

  bool is_due(uint64_t seq) override {
    int num_freed = 0;
    const bool due = reader_.is_due(seq, num_freed);
    if (num_freed != 0) link_.ring();
    return due;
  }

 private:
  SlotLink& link_;
};

SlotLink::SlotLink(std::string peer, bool is_shared, double yield_s)
    : peer_(std::move(peer)), is_shared_(is_shared), yield_s_(yield_s) {}

SlotLink::~SlotLink() = default;

const std::function<void()>& SlotLink::pump() const {
  static const std::function<void()> none;
  return none;
}

Outbox& SlotLink::outbox(uint16_t mailbox, size_t capacity_bytes) {
  check_number(mailbox, outboxes_.contains(mailbox));
  auto box = std::make_unique<SlotOutbox>(*this, mailbox, capacity_bytes);
  return *(outboxes_[mailbox] = std::move(box));
}

Inbox& SlotLink::inbox(uint16_t mailbox, size_t capacity_bytes) {
  check_number(mailbox, inboxes_.contains(mailbox));
  failure_.check();
  SlotReader reader(publish(mailbox, capacity_bytes), peer_);
  auto box = std::make_unique<SlotLinkInbox>(*this, std::move(reader));
  ring();
  return *(inboxes_[mailbox] = std::move(box));
}

size_t SlotLink::wait_any(std::span<const Awaited> awaited, double deadline) {
  failure_.check();
  size_t found = awaited.size();
  const auto ready = [&] {
    for (size_t i = 0; i < awaited.size(); ++i) {
      if (static_cast<SlotLinkInbox*>(awaited[i].inbox)->is_due(awaited[i].seq)) {
        found = i;
        return true;
      }
    }
    return false;
  };
  try {
    until(ready, [&] { return "posted none of " + std::to_string(awaited.size()) + " messages"; },
          deadline);
  } catch (const TransportFailure& failure) {
    if (failure.kind == Kind::protocol) throw_broken(failure);
    throw;
  }
  return found;
}

template <typename Ready, typename Describe>
void SlotLink::until(const Ready& ready, const Describe& what, double deadline) {
  if (ready()) return;
  Pacer pacer(yield_s_);
  while (true) {
    failure_.check();
    if (is_peer_closed()) {
      if (ready()) return;  // it came before the end
      failure_.check();
      peer_lost();
    }
    if (is_pumped() || monotonic_s() >= deadline) {
      if (ready()) return;
      if (is_peer_gone(/*is_thorough=*/true)) peer_lost();
      throw TransportFailure(Kind::deadline, what() + " in time", peer_);
    }
    if (pump()) {
      pump()();
    } else if (pacer.step()) {
      sleep(ready, deadline);
      if (!ready() && is_peer_gone(/*is_thorough=*/true)) {
        if (ready()) return;
        failure_.check();
        peer_lost();
      }
    }
    if (ready()) {
      failure_.check();
      return;
    }
  }
}

template <typename Ready>
void SlotLink::sleep(const Ready& ready, double deadline) {
  own_doorbell().sleep([&] { return ready() || failure_.is_set() || is_peer_closed(); },
                       std::min(kLifelineSeconds, deadline - monotonic_s()), is_shared_);
}

void SlotLink::ring() {
  Doorbell* bell = other_doorbell();
  if (bell != nullptr) bell->ring_if_heard(is_shared_);
}

void SlotLink::wake_self() { own_doorbell().ring(is_shared_); }

void SlotLink::hang_up() { own_state().is_closed.store(1, std::memory_order_seq_cst); }

bool SlotLink::is_peer_closed() {
  EndState* state = other_state();
  return state != nullptr && state->is_closed.load(std::memory_order_acquire) != 0;
}

void SlotLink::check() {
  failure_.check();
  if (is_peer_closed()) peer_lost();
}

void SlotLink::peer_lost() {
  throw_broken({Kind::peer_lost, loss(), peer_});
}

void SlotLink::broken(const TransportFailure& error) {
  if (!failure_.set(error)) return;
  hang_up();
  ring();
  wake_self();
}

void SlotLink::fail(const std::string& reason) { broken({Kind::peer_lost, reason, peer_}); }

}  // namespace lamina
