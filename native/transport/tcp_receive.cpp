// How a tcp link reads frames.
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "transport/tcp_boxes.h"

namespace lamina {

namespace {

using Kind = TransportFailure::Kind;

/// As Python shows bytes.
std::string shown(const char* bytes, size_t count) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text = "b'";
  for (size_t i = 0; i < count; ++i) {
    const auto byte = static_cast<unsigned char>(bytes[i]);
    if (byte >= 0x20 && byte < 0x7f) {
      text += bytes[i];
    } else {
      text += {'\\', 'x', kDigits[byte >> 4], kDigits[byte & 15]};
    }
  }
  return text + "'";
}

}  // namespace

/// `expected`: the mailbox that the next frame is probably for; null: unknown.
TcpLink::Received TcpLink::receive_some(TcpInbox* expected) {
  if (!end_.empty()) return Received::none;
  if (expected != nullptr && !has_header_ && staged_begin_ == staged_end_ &&
      expected->last_num_bytes > kStagingBytes && expected->writer.has_room()) {
    return receive_expected(*expected);
  }
  if (!has_header_ && staged_end_ - staged_begin_ >= sizeof(FrameHeader)) {
    header_ = parse(staging_.data() + staged_begin_);
    staged_begin_ += sizeof(FrameHeader);
    has_header_ = true;
  }
  if (has_header_ && box_ == nullptr && !place()) return Received::no_room;
  if (box_ != nullptr) {
    const size_t num_wanted = header_.num_bytes - num_got_;
    std::byte* target = box_->writer.next_slot() + num_got_;
    const size_t num_staged = std::min(num_wanted, staged_end_ - staged_begin_);
    std::memcpy(target, staging_.data() + staged_begin_, num_staged);
    staged_begin_ += num_staged;
    num_got_ += num_staged;
    if (num_got_ < header_.num_bytes) {
      size_t count = 0;
      if (!read(target + num_staged, num_wanted - num_staged, count)) return Received::none;
      num_got_ += count;
    }
    if (num_got_ == header_.num_bytes) arrived();
    return Received::some;
  }
  // Part of a header may lie there.
  std::memmove(staging_.data(), staging_.data() + staged_begin_, staged_end_ - staged_begin_);
  staged_end_ -= staged_begin_;
  staged_begin_ = 0;
  size_t count = 0;
  return read(nullptr, 0, count) ? Received::some : Received::none;
}

TcpLink::Received TcpLink::receive_expected(TcpInbox& expected) {
  constexpr size_t kHead = sizeof(FrameHeader);
  const size_t num_expected = expected.last_num_bytes;
  std::byte* slot = expected.writer.next_slot();
  iovec parts[3] = {{staging_.data(), kHead},
                    {slot, num_expected},
                    {staging_.data() + kHead, kStagingBytes - kHead}};
  size_t count = 0;
  if (!read_parts(parts, 3, count)) return Received::none;
  staged_begin_ = 0;
  staged_end_ = std::min(count, kHead);
  if (count < kHead) return Received::some;
  count -= kHead;
  const size_t num_in_slot = std::min(count, num_expected);
  const size_t num_behind = count - num_in_slot;
  header_ = parse(staging_.data());
  if (header_.num_bytes == num_expected && inboxes_.contains(header_.mailbox) &&
      inboxes_[header_.mailbox].get() == &expected) {
    staged_begin_ = kHead;
    staged_end_ = kHead + num_behind;
    has_header_ = true;
    place();
    num_got_ = num_in_slot;
    if (num_got_ == header_.num_bytes) arrived();
    return Received::some;
  }
  staging_.resize(std::max(staging_.size(), kHead + count));
  std::memmove(staging_.data() + kHead + num_in_slot, staging_.data() + kHead, num_behind);
  std::memcpy(staging_.data() + kHead, slot, num_in_slot);
  staged_end_ = kHead + count;
  return Received::some;
}

bool TcpLink::place() {
  const auto found = inboxes_.find(header_.mailbox);
  if (found == inboxes_.end() || !found->second->writer.has_room()) return false;
  found->second->writer.check(header_.seq, header_.num_bytes, peer_);
  box_ = found->second.get();
  num_got_ = 0;
  return true;
}

/// Read towards `num_wanted` bytes of `target`, and into the staging buffer what comes after them.
/// `num_got`: bytes of `target`. False when there is nothing.
bool TcpLink::read(std::byte* target, size_t num_wanted, size_t& num_got) {
  if (num_wanted != 0) staged_begin_ = staged_end_ = 0;  // the staged bytes are used up
  iovec parts[2] = {{target, num_wanted},
                    {staging_.data() + staged_end_, kStagingBytes - staged_end_}};
  size_t count = 0;
  if (!(num_wanted != 0 ? read_parts(parts, 2, count) : read_parts(parts + 1, 1, count))) {
    return false;
  }
  num_got = std::min(num_wanted, count);
  staged_end_ += count - num_got;
  return true;
}

bool TcpLink::read_parts(const iovec* parts, int num_parts, size_t& num_read) {
  const ssize_t count = num_parts == 1 ? ::read(fd_, parts->iov_base, parts->iov_len)
                                       : ::readv(fd_, parts, num_parts);
  if (count < 0) {
    const int error = errno;
    if (error == EAGAIN || error == EINTR) return false;
    end_ = std::string("the connection broke: ") + std::strerror(error);
    return false;
  }
  if (count == 0) {
    end_ = "closed the connection";
    return false;
  }
  num_read = static_cast<size_t>(count);
  return true;
}

void TcpLink::arrived() {
  box_->writer.publish(header_.seq, header_.num_bytes);
  box_->last_num_bytes = header_.num_bytes;
  box_ = nullptr;
  has_header_ = false;
}

FrameHeader TcpLink::parse(const std::byte* data) const {
  FrameHeader header;
  std::memcpy(&header, data, sizeof(header));
  if (std::memcmp(header.magic, kFrameMagic, sizeof(kFrameMagic)) != 0) {
    throw TransportFailure(
        Kind::protocol,
        "a frame that starts with " + shown(header.magic, 4) + " instead of " + shown(kFrameMagic, 4),
        peer_);
  }
  if (header.version != version_) {
    throw TransportFailure(Kind::protocol,
                           "speaks protocol version " + std::to_string(header.version) +
                               ", this side " + std::to_string(version_) +
                               "; run the same Lamina version on both sides",
                           peer_);
  }
  return header;
}

void TcpLink::stuck() {
  using std::to_string;
  if (!inboxes_.contains(header_.mailbox)) {
    throw TransportFailure(Kind::protocol,
                           "posted to mailbox " + to_string(header_.mailbox) +
                               ", which this side does not have",
                           peer_);
  }
  throw TransportFailure(Kind::protocol,
                         "message " + to_string(header_.seq) + " of mailbox " +
                             to_string(header_.mailbox) +
                             " is in front of what this side waits for, and two messages before "
                             "it are still unread",
                         peer_);
}

}  // namespace lamina
