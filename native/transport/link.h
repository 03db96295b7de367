// The mailbox contract in C++. `src/lamina/transport/mailbox.py` states it in full; here is what the
// native side adds: messages are written in place. A wait for mailboxes of several links is in
// wait_any.h.
//
// Threads: one thread posts and waits on a link; `fail` and `close` may be called from any thread
// and wake it. Deadlines are values of `monotonic_s()`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>

namespace lamina {

/// Becomes lamina.errors.PeerLost, DeadlineExceeded or ProtocolMismatch in Python.
class TransportFailure : public std::runtime_error {
 public:
  enum class Kind { peer_lost, deadline, protocol };

  TransportFailure(Kind kind, const std::string& reason, const std::string& peer)
      : std::runtime_error(reason), kind(kind), peer(peer) {}

  Kind kind;
  std::string peer;
};

class Outbox {
 public:
  virtual ~Outbox() = default;
  virtual size_t capacity_bytes() const = 0;

  /// Whether a message can be posted now without waiting for the receiver. Never blocks.
  virtual bool has_room() = 0;

  /// Where the payload of message `seq` goes, aligned to 64 bytes. Blocks while both slots are taken.
  /// The caller writes `num_bytes` bytes and calls `commit`; nothing else happens on the link between.
  virtual std::byte* reserve(uint64_t seq, size_t num_bytes, double deadline) = 0;

  /// Send the reserved message.
  virtual void commit(double deadline) = 0;
};

class Source;

class Inbox {
 public:
  virtual ~Inbox() = default;
  virtual size_t capacity_bytes() const = 0;

  /// The payload of message `seq`, aligned to 64 bytes; valid until the next `wait` on this mailbox.
  virtual std::span<const std::byte> wait(uint64_t seq, double deadline,
                                          std::optional<size_t> num_bytes) = 0;

  /// Whether message `seq` is here, before any other that was not discarded. Takes in what has come.
  /// Never blocks, and leaves it to waits to say that the peer is gone.
  virtual bool holds(uint64_t seq) = 0;

  /// Whether `wait(seq)` would return or fail at once because of what was received. Discards
  /// messages with smaller numbers, which ends no view. Never blocks.
  virtual bool is_due(uint64_t seq) = 0;

  /// The connection that the messages come from.
  virtual Source& source() = 0;
};

/// A message that somebody waits for.
struct Awaited {
  Inbox* inbox;
  uint64_t seq;
};

class Link {
 public:
  virtual ~Link() = default;
  virtual const std::string& peer() const = 0;

  /// Owned by the link; valid until it is destroyed (after `close` their calls fail).
  virtual Outbox& outbox(uint16_t mailbox, size_t capacity_bytes) = 0;
  virtual Inbox& inbox(uint16_t mailbox, size_t capacity_bytes) = 0;

  virtual void fail(const std::string& reason) = 0;
  virtual void close() = 0;
};

}  // namespace lamina
