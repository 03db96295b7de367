// The test double among the links: wraps one and does what networks and crashes do. What the faults
// mean is stated in src/lamina/transport/faulty.py.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "transport/link.h"

namespace lamina {

enum class FaultKind { delay, drop, reorder, truncate, close, kill };

/// What happens to which of the messages that are posted from now on.
struct Fault {
  FaultKind kind;
  std::optional<uint16_t> mailbox;  // only messages of this one
  int64_t after = 0;                // messages to let through first
  std::optional<int64_t> count;     // messages to affect then; none: all
  double delay_s = 0.0;
};

class FaultyOutbox;

/// A link with faults on its sending side; without any it hands everything through.
class FaultyLink : public Link {
 public:
  explicit FaultyLink(std::shared_ptr<Link> link);
  ~FaultyLink() override;

  const std::string& peer() const override { return link_->peer(); }
  Outbox& outbox(uint16_t mailbox, size_t capacity_bytes) override;
  Inbox& inbox(uint16_t mailbox, size_t capacity_bytes) override {
    return link_->inbox(mailbox, capacity_bytes);
  }
  void fail(const std::string& reason) override { link_->fail(reason); }
  void close() override { link_->close(); }

  /// From any thread. Of several faults that apply to a message the first counts.
  void inject(const Fault& fault);

  /// End all faults. A message that `reorder` holds back goes out after the next one.
  void clear();

 private:
  friend class FaultyOutbox;

  struct Counted {
    Fault fault;
    int64_t num_seen = 0;
  };
  struct Held {
    Outbox& outbox;
    uint64_t seq;
    std::vector<std::byte> payload;
  };

  std::optional<Fault> due(uint16_t mailbox);
  void post_held(double deadline);

  std::shared_ptr<Link> link_;
  std::mutex mutex_;
  std::vector<Counted> faults_;
  std::optional<Held> held_;
  std::map<uint16_t, std::unique_ptr<FaultyOutbox>> outboxes_;
};

}  // namespace lamina
