// The link between two processes of one machine: shared memory, and a Unix socket as life-line.
//
// The receiver of a mailbox makes its memory and passes it through the socket; the sender picks it
// up when it first posts. After that the socket carries nothing: its end means that the other
// process closed or died. A wait looks at it before it sleeps and every 10 ms while it does.
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

 protected:
  SlotMemory publish(uint16_t mailbox, size_t capacity_bytes) override;
  bool find(uint16_t mailbox, SlotMemory& memory) override;
  Bell* other_bell() override;
  Bell& own_bell() override { return *reinterpret_cast<Bell*>(own_->data()); }
  bool is_peer_gone() override;
  void hang_up() override;

 private:
  bool send(uint16_t mailbox, size_t capacity_bytes, int fd);
  void receive_all();
  bool receive_one();

  std::mutex mutex_;
  int fd_;
  bool is_eof_ = false;
  std::shared_ptr<Memory> own_;
  std::shared_ptr<Memory> other_;
  std::atomic<Bell*> other_bell_{nullptr};
  std::map<uint16_t, SlotMemory> found_;
};

}  // namespace lamina
