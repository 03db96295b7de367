// Waiting for the first of several messages that come over several links.
//
// Links of shared memory ring one bell of their process, so one futex wakes for all of them; tcp links
// are polled together. Where both kinds (or links within the process) are watched at once, nothing
// wakes for all: the wait then sleeps for 0.2 ms at a time.
#pragma once

#include <poll.h>

#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "transport/source.h"

namespace lamina {

/// The links that one thread waits for. They must outlive it; one whose peer is gone ends every wait.
class WaitSet {
 public:
  explicit WaitSet(std::vector<Source*> sources);
  WaitSet(const WaitSet&) = delete;
  WaitSet& operator=(const WaitSet&) = delete;

  /// Block until `wait` on one of these inboxes would return or fail at once, without taking
  /// anything; the first such in the order given. Messages with smaller numbers than awaited may be
  /// discarded, which ends no view. Several messages may lie unread meanwhile, at most two in any
  /// mailbox. Links with a pump can only be waited for alone.
  /// Throws TransportFailure; PeerLost names the peer that is gone.
  size_t wait(std::span<const Awaited> awaited, double deadline);

 private:
  bool find(std::span<const Awaited> awaited, size_t& found) const;
  bool receive(std::span<const Awaited> awaited);
  void check_peers(std::span<const Awaited> awaited, size_t& found, bool is_thorough);
  void sleep(std::span<const Awaited> awaited, double deadline);
  [[noreturn]] void overdue(size_t num_awaited) const;

  std::vector<Source*> sources_;
  Doorbell* doorbell_;  // of all of them; null: there is none
  double yield_s_ = 0.0;
  std::vector<pollfd> polled_;
  std::vector<std::unique_lock<std::mutex>> locks_;
};

/// As `WaitSet::wait`, over the links of these inboxes.
size_t wait_any(std::span<const Awaited> awaited, double deadline);

/// Each once, in the order in which they come first.
std::vector<Source*> sources_of(std::span<Inbox* const> inboxes);

}  // namespace lamina
