#include "transport/shm.h"

#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <mutex>

namespace lamina {

namespace {

using Kind = TransportFailure::Kind;

/// What goes through the socket with each file descriptor; of mailbox 0 are the memory of the
/// sender's doorbell and of its state, by capacity.
struct Announcement {
  char magic[4];
  uint16_t version;
  uint16_t mailbox;
  uint64_t capacity_bytes;
};
static_assert(sizeof(Announcement) == 16);

constexpr char kMagic[4] = {'L', 'M', 'N', 'S'};
constexpr uint16_t kVersion = 2;
constexpr uint64_t kDoorbell = 0, kState = 1;

/// The doorbell of all links that this process makes; a forked child gets one of its own.
std::shared_ptr<Memory> process_doorbell() {
  static std::mutex mutex;
  static std::shared_ptr<Memory> memory;
  static pid_t owner = 0;
  const std::lock_guard lock(mutex);
  if (owner != getpid()) {
    memory = Memory::make_shared(sizeof(Doorbell));
    owner = getpid();
  }
  return memory;
}

}  // namespace

ShmLink::ShmLink(int fd, std::string peer, double yield_s)
    : SlotLink(std::move(peer), /*is_shared=*/true, yield_s),
      fd_(fd),
      own_doorbell_(process_doorbell()),
      own_state_(Memory::make_shared(sizeof(EndState))) {
  if (!send(0, kDoorbell, own_doorbell_->fd()) || !send(0, kState, own_state_->fd())) {
    fail("closed the link or died");
  }
  own_state_->close_fd();
}

ShmLink::~ShmLink() { close(); }

void ShmLink::close() {
  fail("this end of the link is closed");
  std::lock_guard lock(mutex_);
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

void ShmLink::hang_up() {
  SlotLink::hang_up();
  std::lock_guard lock(mutex_);
  if (fd_ >= 0) shutdown(fd_, SHUT_WR);
}

SlotMemory ShmLink::publish(uint16_t mailbox, size_t capacity_bytes) {
  SlotMemory memory{mailbox, capacity_bytes,
                    Memory::make_shared(SlotMemory::num_bytes(capacity_bytes))};
  if (!send(mailbox, capacity_bytes, memory.memory->fd())) {
    broken({Kind::peer_lost, "closed the link or died", peer()});
  }
  memory.memory->close_fd();
  return memory;
}

bool ShmLink::send(uint16_t mailbox, size_t capacity_bytes, int fd) {
  Announcement announcement{{}, kVersion, mailbox, capacity_bytes};
  std::memcpy(announcement.magic, kMagic, sizeof(kMagic));
  iovec part{&announcement, sizeof(announcement)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  cmsghdr* head = CMSG_FIRSTHDR(&message);
  head->cmsg_level = SOL_SOCKET;
  head->cmsg_type = SCM_RIGHTS;
  head->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(head), &fd, sizeof(int));
  std::lock_guard lock(mutex_);
  if (fd_ < 0) return false;
  ssize_t count;
  do {
    count = sendmsg(fd_, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  } while (count < 0 && errno == EINTR);
  return count == sizeof(announcement);
}

bool ShmLink::receive_one() {
  Announcement announcement;
  iovec part{&announcement, sizeof(announcement)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  const ssize_t count = recvmsg(fd_, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (count < 0) {
    if (errno != EAGAIN && errno != EINTR) is_eof_ = true;
    return errno == EINTR;
  }
  if (count == 0) {
    is_eof_ = true;
    return false;
  }
  int fd = -1;
  const cmsghdr* head = CMSG_FIRSTHDR(&message);
  if (head != nullptr && head->cmsg_level == SOL_SOCKET && head->cmsg_type == SCM_RIGHTS &&
      head->cmsg_len == CMSG_LEN(sizeof(int))) {
    std::memcpy(&fd, CMSG_DATA(head), sizeof(int));
  }
  if (fd < 0 || count != sizeof(announcement) || announcement.version != kVersion ||
      std::memcmp(announcement.magic, kMagic, sizeof(kMagic)) != 0) {
    if (fd >= 0) ::close(fd);
    throw TransportFailure(Kind::protocol,
                           "sent something else than a mailbox; run the same Lamina version on "
                           "both sides",
                           peer());
  }
  if (announcement.mailbox == 0 && announcement.capacity_bytes == kDoorbell) {
    other_doorbell_memory_ = Memory::map_shared(fd, sizeof(Doorbell));
    other_doorbell_.store(reinterpret_cast<Doorbell*>(other_doorbell_memory_->data()),
                          std::memory_order_release);
  } else if (announcement.mailbox == 0) {
    other_state_memory_ = Memory::map_shared(fd, sizeof(EndState));
    other_state_.store(reinterpret_cast<EndState*>(other_state_memory_->data()),
                       std::memory_order_release);
  } else {
    const size_t capacity_bytes = announcement.capacity_bytes;
    found_[announcement.mailbox] = {
        announcement.mailbox, capacity_bytes,
        Memory::map_shared(fd, SlotMemory::num_bytes(capacity_bytes))};
  }
  return true;
}

void ShmLink::receive_all() {
  std::unique_lock lock(mutex_);
  if (fd_ < 0) is_eof_ = true;
  try {
    while (!is_eof_ && receive_one()) {
    }
  } catch (const TransportFailure& failure) {
    lock.unlock();
    broken(failure);
    throw;
  } catch (const std::runtime_error& error) {
    lock.unlock();
    broken({Kind::protocol, std::string("its mailbox cannot be mapped: ") + error.what(), peer()});
    failure_.check();
  }
}

bool ShmLink::find(uint16_t mailbox, SlotMemory& memory) {
  receive_all();
  std::lock_guard lock(mutex_);
  const auto found = found_.find(mailbox);
  if (found == found_.end()) return false;
  memory = found->second;
  return true;
}

/// What the other end announces first, as soon as it has come.
template <typename T>
T* ShmLink::awaited(const std::atomic<T*>& part) {
  T* here = part.load(std::memory_order_acquire);
  if (here != nullptr || failure_.is_set()) return here;
  receive_all();
  return part.load(std::memory_order_acquire);
}

Doorbell* ShmLink::other_doorbell() { return awaited(other_doorbell_); }

EndState* ShmLink::other_state() { return awaited(other_state_); }

bool ShmLink::is_peer_gone(bool is_thorough) {
  if (is_peer_closed()) return true;
  if (!is_thorough) return false;
  receive_all();
  std::lock_guard lock(mutex_);
  return is_eof_;
}

}  // namespace lamina
