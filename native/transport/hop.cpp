#include "transport/hop.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/wait.h"

namespace lamina {

namespace {

/// Byte `i` of message `seq`: another one in every message and at every place.
std::byte expected(uint64_t seq, size_t i) {
  return static_cast<std::byte>((seq * 131 + i * 7 + (i >> 8)) & 0xff);
}

void fill(std::byte* slot, uint64_t seq, size_t num_bytes) {
  for (size_t i = 0; i < num_bytes; ++i) slot[i] = expected(seq, i);
}

void verify(std::span<const std::byte> payload, uint64_t seq) {
  bool is_right = true;
  for (size_t i = 0; i < payload.size(); ++i) is_right &= payload[i] == expected(seq, i);
  if (!is_right) throw std::runtime_error("message " + std::to_string(seq) + " arrived changed");
}

void send_all(int fd, const std::byte* data, size_t num_bytes) {
  while (num_bytes != 0) {
    const ssize_t count = ::send(fd, data, num_bytes, MSG_NOSIGNAL);
    if (count < 0 && errno != EINTR) throw std::runtime_error(std::strerror(errno));
    if (count > 0) {
      data += count;
      num_bytes -= static_cast<size_t>(count);
    }
  }
}

void receive_all(int fd, std::byte* data, size_t num_bytes, bool yields) {
  Pacer pacer;
  while (num_bytes != 0) {
    const ssize_t count = ::recv(fd, data, num_bytes, yields ? MSG_DONTWAIT : MSG_WAITALL);
    if (count == 0) throw std::runtime_error("the other side is gone");
    if (count < 0 && errno != EAGAIN && errno != EINTR) {
      throw std::runtime_error(std::strerror(errno));
    }
    if (count > 0) {
      data += count;
      num_bytes -= static_cast<size_t>(count);
      pacer = Pacer();
    } else if (pacer.step()) {
      pollfd one{fd, POLLIN, 0};
      poll(&one, 1, -1);
    }
  }
}

}  // namespace

std::vector<double> ping(Outbox& outbox, Inbox& inbox, const PingPong& what) {
  const std::vector<std::byte> payload(what.num_bytes, std::byte{1});
  std::vector<double> seconds(static_cast<size_t>(what.count));
  for (int64_t i = 0; i < what.count; ++i) {
    const uint64_t seq = what.first_seq + static_cast<uint64_t>(i);
    const double start = monotonic_s();
    const double deadline = start + what.timeout_s;
    std::byte* slot = outbox.reserve(seq, what.num_bytes, deadline);
    if (what.check) {
      fill(slot, seq, what.num_bytes);
    } else {
      std::copy(payload.begin(), payload.end(), slot);
    }
    outbox.commit(deadline);
    const auto answer = inbox.wait(seq, deadline, what.num_bytes);
    seconds[static_cast<size_t>(i)] = monotonic_s() - start;
    if (what.check) verify(answer, seq);
  }
  return seconds;
}

void pong(Inbox& inbox, Outbox& outbox, const PingPong& what) {
  for (int64_t i = 0; i < what.count; ++i) {
    const uint64_t seq = what.first_seq + static_cast<uint64_t>(i);
    const double deadline = monotonic_s() + what.timeout_s;
    const auto question = inbox.wait(seq, deadline, what.num_bytes);
    if (what.check) verify(question, seq);
    std::byte* slot = outbox.reserve(seq, what.num_bytes, deadline);
    std::memcpy(slot, question.data(), what.num_bytes);
    outbox.commit(deadline);
  }
}

std::vector<double> bare_ping(int fd, int64_t count, size_t num_bytes, bool yields) {
  std::vector<std::byte> payload(std::max<size_t>(1, num_bytes), std::byte{1});
  std::vector<double> seconds(static_cast<size_t>(count));
  for (double& one : seconds) {
    const double start = monotonic_s();
    send_all(fd, payload.data(), payload.size());
    receive_all(fd, payload.data(), payload.size(), yields);
    one = monotonic_s() - start;
  }
  return seconds;
}

void bare_pong(int fd, int64_t count, size_t num_bytes, bool yields) {
  std::vector<std::byte> payload(std::max<size_t>(1, num_bytes));
  for (int64_t i = 0; i < count; ++i) {
    receive_all(fd, payload.data(), payload.size(), yields);
    send_all(fd, payload.data(), payload.size());
  }
}

}  // namespace lamina
