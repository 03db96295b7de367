// The link between two machines: frames over a connected socket.
//
//   frame    "LMNF" | version u16 | mailbox u16 | sequence number u64 | payload bytes u64 | payload
//
// all integers little-endian. No thread of its own: a wait reads frames into the slots of whatever
// mailbox they belong to until the wanted one is complete; a post sends header and payload with one
// call, and while the socket takes no more it reads what comes, so that two peers that post large
// messages to each other both get through.
//
// Reading: small frames come out of the socket several at a time through a staging buffer; what a
// large one lacks then is read straight into its slot. A wait expects the next frame to be as long
// as the last one of the mailbox it waits for, and if that is large, has the whole of it put into
// the slot with one call. When something else comes, it is moved to the staging buffer.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/wait.h"
#include "transport/failure.h"
#include "transport/link.h"
#include "transport/slots.h"
#include "transport/source.h"

namespace lamina {

struct FrameHeader {
  char magic[4];
  uint16_t version;
  uint16_t mailbox;
  uint64_t seq;
  uint64_t num_bytes;
};
static_assert(sizeof(FrameHeader) == 24);
constexpr char kFrameMagic[4] = {'L', 'M', 'N', 'F'};

class TcpInbox;
class TcpOutbox;

class TcpLink : public Link, public Source {
 public:
  /// Takes over `fd`, a connected stream socket whose hello and welcome are exchanged.
  /// `busy_poll_s`: how long a wait looks and yields before it sleeps.
  TcpLink(int fd, std::string peer, uint16_t version, double busy_poll_s);
  ~TcpLink() override;

  const std::string& peer() const override { return peer_; }
  Outbox& outbox(uint16_t mailbox, size_t capacity_bytes) override;
  Inbox& inbox(uint16_t mailbox, size_t capacity_bytes) override;
  void fail(const std::string& reason) override;
  void close() override;

  size_t wait_any(std::span<const Awaited> awaited, double deadline) override;
  double yield_s() const override { return busy_poll_s_; }
  void check_failure() const override { failure_.check(); }
  void broken(const TransportFailure& error) override;
  bool receive(Inbox* expected) override;
  bool is_peer_gone(bool is_thorough) override;
  std::string loss() const override { return end_; }
  Doorbell* doorbell() override { return nullptr; }
  pollfd polled(std::unique_lock<std::mutex>& lock) override;

 private:
  friend class TcpInbox;
  friend class TcpOutbox;

  /// What `receive` found: bytes, none yet, or a frame that has no place.
  enum class Received { some, none, no_room };

  template <typename Ready, typename Describe>
  void until(const Ready& ready, const Describe& what, double deadline, TcpInbox* expected);

  void send(const std::byte* data, size_t num_bytes, uint16_t mailbox, uint64_t seq,
            double deadline);
  size_t send_some(const std::byte* data, size_t num_bytes);
  bool can_send();

  Received receive_some(TcpInbox* expected);
  Received receive_expected(TcpInbox& expected);
  bool place();
  bool read(std::byte* target, size_t num_wanted, size_t& num_got);
  bool read_parts(const iovec* parts, int num_parts, size_t& num_read);
  void arrived();
  FrameHeader parse(const std::byte* data) const;

  [[noreturn]] void lost(const std::string& reason);
  void check_end();
  [[noreturn]] void stuck();
  void poll(short events, double deadline);

  /// Grows only when an expectation was wrong.
  static constexpr size_t kStagingBytes = 4096;

  std::string peer_;
  uint16_t version_;
  double busy_poll_s_;
  Failure failure_;
  std::mutex in_use_;  // held while a thread uses the socket, so that `close` frees it afterwards
  std::mutex closing_;
  int fd_;

  std::map<uint16_t, std::unique_ptr<TcpOutbox>> outboxes_;
  std::map<uint16_t, std::unique_ptr<TcpInbox>> inboxes_;

  // The frame that is being received: its header, its mailbox once there is room, what is there.
  bool is_stuck_ = false;  // the last `receive` found a frame that has no place
  std::string end_;        // why nothing more can be read; empty: it can
  bool has_header_ = false;
  FrameHeader header_ = {};
  TcpInbox* box_ = nullptr;
  size_t num_got_ = 0;
  std::vector<std::byte> staging_ = std::vector<std::byte>(kStagingBytes);
  size_t staged_begin_ = 0;
  size_t staged_end_ = 0;
};

}  // namespace lamina
