// The link between two processes of one machine: shared memory, and a Unix socket as life-line.
//
// The receiver of a mailbox makes its memory and passes it through the socket; the sender picks it
// up when it first posts. After that the socket carries nothing: its end means that the other
// process closed or died. A wait looks at it before it sleeps and every 10 ms while it does.
//
// All links of a process have one doorbell, so that a thread can sleep on several of them.
#pragma once

#include <map>
#include <memory>
#include <mutex>

#include "transport/slot_link.h"

namespace lamina {

class ShmLink : public SlotLink {
 public:
  /// Takes over `fd`, a connected Unix stream socket whose hello and welcome are exchanged.
  ShmLink(int fd, std::string peer, double yield_s);
  ~ShmLink() override;
  void close() override;

  bool is_peer_gone(bool is_thorough) override;
  Doorbell* doorbell() override { return &own_doorbell(); }

 protected:
  SlotMemory publish(uint16_t mailbox, size_t capacity_bytes) override;
  bool find(uint16_t mailbox, SlotMemory& memory) override;
  Doorbell* other_doorbell() override;
  EndState* other_state() override;
  Doorbell& own_doorbell() override { return *reinterpret_cast<Doorbell*>(own_doorbell_->data()); }
  EndState& own_state() override { return *reinterpret_cast<EndState*>(own_state_->data()); }
  void hang_up() override;

 private:
  template <typename T>
  T* awaited(const std::atomic<T*>& part);
  bool send(uint16_t mailbox, size_t capacity_bytes, int fd);
  void receive_all();
  bool receive_one();

  std::mutex mutex_;
  int fd_;
  bool is_eof_ = false;
  std::shared_ptr<Memory> own_doorbell_, own_state_;
  std::shared_ptr<Memory> other_doorbell_memory_, other_state_memory_;
  std::atomic<Doorbell*> other_doorbell_{nullptr};
  std::atomic<EndState*> other_state_{nullptr};
  std::map<uint16_t, SlotMemory> found_;
};

}  // namespace lamina
