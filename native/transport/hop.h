// Ping-pong over a link, and over a bare socket to compare with. For `lamina bench hop`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "transport/link.h"

namespace lamina {

/// Messages first_seq ... first_seq + count - 1 of `num_bytes` each go out and come back.
struct PingPong {
  uint64_t first_seq;
  int64_t count;
  size_t num_bytes;
  bool check;          // every byte of every message, on both sides
  double timeout_s;    // of each message
};

/// Seconds from the first byte written to the answer's arrival, for each message. The payload is
/// copied into the slot and read where it arrives. Throws std::runtime_error if a checked message
/// is not what was sent.
std::vector<double> ping(Outbox& outbox, Inbox& inbox, const PingPong& what);

/// The other side: copies each message that comes into the answer's slot.
void pong(Inbox& inbox, Outbox& outbox, const PingPong& what);

/// The same over a connected stream socket without mailboxes: one send, and as many receives as it
/// takes. `yields`: wait as the links do (core/wait.h); otherwise in blocking calls. An empty
/// message is one byte.
std::vector<double> bare_ping(int fd, int64_t count, size_t num_bytes, bool yields);
void bare_pong(int fd, int64_t count, size_t num_bytes, bool yields);

}  // namespace lamina
