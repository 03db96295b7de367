#include "transport/tcp.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "transport/tcp_boxes.h"

namespace lamina {

namespace {

using Kind = TransportFailure::Kind;

}  // namespace

TcpLink::TcpLink(int fd, std::string peer, uint16_t version, double busy_poll_s)
    : peer_(std::move(peer)), version_(version), busy_poll_s_(busy_poll_s), fd_(fd) {
  fcntl(fd_, F_SETFL, fcntl(fd_, F_GETFL) | O_NONBLOCK);
  const int on = 1;
  setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  // Lets the kernel poll the network card meanwhile, where it has one to poll and we may ask.
  const int busy_poll_us = static_cast<int>(std::min(busy_poll_s_, 1.0) * 1e6);
  setsockopt(fd_, SOL_SOCKET, SO_BUSY_POLL, &busy_poll_us, sizeof(busy_poll_us));
}

TcpLink::~TcpLink() { close(); }

Outbox& TcpLink::outbox(uint16_t mailbox, size_t capacity_bytes) {
  check_number(mailbox, outboxes_.contains(mailbox));
  auto box = std::make_unique<TcpOutbox>(*this, mailbox, capacity_bytes);
  return *(outboxes_[mailbox] = std::move(box));
}

Inbox& TcpLink::inbox(uint16_t mailbox, size_t capacity_bytes) {
  check_number(mailbox, inboxes_.contains(mailbox));
  SlotMemory memory{mailbox, capacity_bytes,
                    Memory::make_private(SlotMemory::num_bytes(capacity_bytes))};
  auto box = std::make_unique<TcpInbox>(*this, std::move(memory), peer_);
  return *(inboxes_[mailbox] = std::move(box));
}

size_t TcpLink::wait_any(std::span<const Awaited> awaited, double deadline) {
  std::lock_guard lock(in_use_);
  failure_.check();
  size_t found = awaited.size();
  const auto ready = [&] {
    for (size_t i = 0; i < awaited.size(); ++i) {
      if (static_cast<TcpInbox*>(awaited[i].inbox)->is_due(awaited[i].seq)) {
        found = i;
        return true;
      }
    }
    return false;
  };
  until(ready, [&] { return "posted none of " + std::to_string(awaited.size()) + " messages"; },
        deadline, awaited.empty() ? nullptr : static_cast<TcpInbox*>(awaited[0].inbox));
  return found;
}

bool TcpLink::receive(Inbox* expected) {
  std::lock_guard lock(in_use_);
  failure_.check();
  try {
    const Received received = receive_some(static_cast<TcpInbox*>(expected));
    is_stuck_ = received == Received::no_room;
    return received == Received::some;
  } catch (const TransportFailure& failure) {
    throw_broken(failure);
  }
}

/// What comes next may have no place until a message of another link was taken: no reason to fail, but
/// then only the end of the connection shows that the peer is gone.
bool TcpLink::is_peer_gone(bool is_thorough) {
  if (end_.empty() && is_stuck_ && is_thorough) {
    std::unique_lock<std::mutex> lock;
    pollfd one = polled(lock);
    if (::poll(&one, 1, 0) == 1) end_ = "closed the connection";
  }
  return !end_.empty();
}

pollfd TcpLink::polled(std::unique_lock<std::mutex>& lock) {
  lock = std::unique_lock(in_use_);
  return {fd_, static_cast<short>(is_stuck_ ? POLLRDHUP : POLLIN), 0};
}

/// With `in_use_` held. ProtocolMismatch breaks the link.
template <typename Ready, typename Describe>
void TcpLink::until(const Ready& ready, const Describe& what, double deadline,
                    TcpInbox* expected) {
  try {
    Pacer pacer(busy_poll_s_);
    while (!ready()) {
      switch (receive_some(expected)) {
        case Received::some:
          pacer = Pacer(busy_poll_s_);
          continue;
        case Received::no_room:
          stuck();
        case Received::none:
          check_end();
          break;
      }
      failure_.check();
      if (monotonic_s() >= deadline) {
        throw TransportFailure(Kind::deadline, what() + " in time", peer_);
      }
      if (pacer.step()) poll(POLLIN, deadline);
    }
  } catch (const TransportFailure& failure) {
    if (failure.kind == Kind::protocol) throw_broken(failure);
    throw;
  }
}

void TcpLink::send(const std::byte* data, size_t num_bytes, uint16_t mailbox, uint64_t seq,
                   double deadline) {
  std::lock_guard lock(in_use_);
  failure_.check();
  size_t num_sent = send_some(data, num_bytes);
  Pacer pacer(busy_poll_s_);
  while (num_sent < num_bytes) {
    Received received;
    try {
      received = receive_some(nullptr);
      check_end();
    } catch (const TransportFailure& failure) {
      if (failure.kind == Kind::protocol) throw_broken(failure);
      throw;
    }
    const size_t count = send_some(data + num_sent, num_bytes - num_sent);
    num_sent += count;
    if (num_sent == num_bytes) return;
    if (count != 0 || received == Received::some) {
      pacer = Pacer(busy_poll_s_);
      continue;
    }
    failure_.check();
    if (monotonic_s() >= deadline) {
      const TransportFailure error(Kind::deadline,
                                   "did not take message " + std::to_string(seq) + " of mailbox " +
                                       std::to_string(mailbox) + " in time",
                                   peer_);
      fail("given up: " + peer_ + ": " + error.what());
      throw error;
    }
    if (!pacer.step()) continue;
    // Without a place for what comes next, its being there must not wake us; its end does.
    poll(received == Received::no_room ? POLLOUT | POLLRDHUP : POLLOUT | POLLIN, deadline);
    if (received == Received::no_room) {
      pollfd one{fd_, POLLRDHUP, 0};
      if (::poll(&one, 1, 0) == 1) lost("closed the connection");
    }
  }
}

size_t TcpLink::send_some(const std::byte* data, size_t num_bytes) {
  const ssize_t count = ::send(fd_, data, num_bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
  if (count >= 0) return static_cast<size_t>(count);
  const int error = errno;
  if (error == EAGAIN || error == EINTR) return 0;
  lost(std::string("the connection broke: ") + std::strerror(error));
}

bool TcpLink::can_send() {
  std::lock_guard lock(in_use_);
  failure_.check();
  pollfd one{fd_, POLLOUT, 0};
  return ::poll(&one, 1, 0) == 1 && (one.revents & POLLOUT) != 0;
}

void TcpLink::poll(short events, double deadline) {
  const double remaining_s = std::max(0.0, deadline - monotonic_s());
  timespec timeout;
  timeout.tv_sec = static_cast<time_t>(std::min(remaining_s, 1e6));
  timeout.tv_nsec = static_cast<long>((remaining_s - static_cast<double>(timeout.tv_sec)) * 1e9);
  if (remaining_s > 1e6) timeout.tv_nsec = 0;
  pollfd one{fd_, events, 0};
  ppoll(&one, 1, &timeout, nullptr);
}

void TcpLink::lost(const std::string& reason) {
  failure_.check();
  throw_broken({Kind::peer_lost, reason, peer_});
}

void TcpLink::check_end() {
  if (!end_.empty()) lost(end_);
}

void TcpLink::broken(const TransportFailure& error) {
  if (!failure_.set(error)) return;
  // Ends the connection, which wakes this side's thread and the peer.
  std::lock_guard lock(closing_);
  if (fd_ >= 0) shutdown(fd_, SHUT_RDWR);
}

void TcpLink::fail(const std::string& reason) { broken({Kind::peer_lost, reason, peer_}); }

void TcpLink::close() {
  fail("this end of the link is closed");
  std::lock_guard lock(in_use_);
  std::lock_guard closing(closing_);
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

std::byte* TcpOutbox::reserve(uint64_t seq, size_t num_bytes, double) {
  using std::to_string;
  link_.failure_.check();
  if (num_bytes > capacity_bytes_) {
    link_.throw_broken({Kind::protocol,
                        "message " + to_string(seq) + " has " + to_string(num_bytes) +
                            " bytes, more than the " + to_string(capacity_bytes_) + " of mailbox " +
                            to_string(mailbox_),
                        link_.peer_});
  }
  header_ = {{}, link_.version_, mailbox_, seq, num_bytes};
  std::memcpy(header_.magic, kFrameMagic, sizeof(kFrameMagic));
  return memory_->data() + kSlotAlignment;
}

void TcpOutbox::commit(double deadline) {
  std::byte* frame = memory_->data() + kSlotAlignment - sizeof(FrameHeader);
  std::memcpy(frame, &header_, sizeof(header_));
  link_.send(frame, sizeof(header_) + header_.num_bytes, mailbox_, header_.seq, deadline);
}

std::span<const std::byte> TcpInbox::wait(uint64_t seq, double deadline,
                                          std::optional<size_t> num_bytes) {
  std::lock_guard lock(link_.in_use_);
  link_.failure_.check();
  reader_.end_view();
  link_.until([&] { return is_due(seq); },
              [&] {
                return "did not post message " + std::to_string(seq) + " of mailbox " +
                       std::to_string(reader_.memory().mailbox);
              },
              deadline, this);
  try {
    return reader_.take(seq, num_bytes);
  } catch (const TransportFailure& failure) {
    link_.throw_broken(failure);
  }
}

bool TcpInbox::holds(uint64_t seq) {
  while (!reader_.holds(seq)) {
    if (!link_.receive(this)) return false;
  }
  return true;
}

bool TcpInbox::is_due(uint64_t seq) {
  int num_freed = 0;
  return reader_.is_due(seq, num_freed);
}

}  // namespace lamina
