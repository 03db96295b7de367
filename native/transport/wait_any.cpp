#include "transport/wait_any.h"

#include <algorithm>
#include <utility>

#include "core/wait.h"

namespace lamina {

namespace {

using Kind = TransportFailure::Kind;

/// Longest sleep on a bell without looking whether the other processes still live.
constexpr double kLifelineSeconds = 0.01;

/// Sleeps where nothing wakes for all links.
constexpr double kNapSeconds = 200e-6;

Doorbell* common_doorbell(const std::vector<Source*>& sources) {
  Doorbell* bell = sources.empty() ? nullptr : sources.front()->doorbell();
  for (Source* source : sources) {
    if (source->doorbell() != bell) return nullptr;
  }
  return bell;
}

}  // namespace

void Doorbell::ring(bool is_shared) {
  num_rings.fetch_add(1, std::memory_order_seq_cst);
  futex_wake(num_rings, is_shared);
}

void Doorbell::ring_if_heard(bool is_shared) {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (num_sleeping.load(std::memory_order_relaxed) != 0) ring(is_shared);
}

std::vector<Source*> sources_of(std::span<Inbox* const> inboxes) {
  std::vector<Source*> sources;
  for (Inbox* inbox : inboxes) {
    Source* source = &inbox->source();
    if (std::find(sources.begin(), sources.end(), source) == sources.end()) {
      sources.push_back(source);
    }
  }
  return sources;
}

size_t wait_any(std::span<const Awaited> awaited, double deadline) {
  std::vector<Inbox*> inboxes;
  for (const Awaited& one : awaited) inboxes.push_back(one.inbox);
  return WaitSet(sources_of(inboxes)).wait(awaited, deadline);
}

WaitSet::WaitSet(std::vector<Source*> sources)
    : sources_(std::move(sources)), doorbell_(common_doorbell(sources_)) {
  for (const Source* source : sources_) yield_s_ = std::max(yield_s_, source->yield_s());
  polled_.reserve(sources_.size());
  locks_.reserve(sources_.size());
}

size_t WaitSet::wait(std::span<const Awaited> awaited, double deadline) {
  if (sources_.size() == 1) return sources_.front()->wait_any(awaited, deadline);
  for (const Source* source : sources_) source->check_failure();
  size_t found = awaited.size();
  Pacer pacer(yield_s_);
  while (true) {
    if (find(awaited, found)) return found;
    if (receive(awaited)) {
      pacer = Pacer(yield_s_);
      continue;
    }
    const bool is_late = monotonic_s() >= deadline;
    check_peers(awaited, found, is_late);
    if (found != awaited.size()) return found;
    if (is_late) overdue(awaited.size());
    if (pacer.step()) {
      sleep(awaited, deadline);
      if (find(awaited, found)) return found;
      check_peers(awaited, found, /*is_thorough=*/true);
    }
  }
}

bool WaitSet::find(std::span<const Awaited> awaited, size_t& found) const {
  for (size_t i = 0; i < awaited.size(); ++i) {
    Inbox& inbox = *awaited[i].inbox;
    try {
      if (!inbox.is_due(awaited[i].seq)) continue;
    } catch (const TransportFailure& failure) {
      inbox.source().throw_broken(failure);
    }
    found = i;
    return true;
  }
  return false;
}

/// Take in what came over any link; false if nothing did.
bool WaitSet::receive(std::span<const Awaited> awaited) {
  bool came = false;
  for (Source* source : sources_) {
    const auto first = std::find_if(awaited.begin(), awaited.end(), [&](const Awaited& one) {
      return &one.inbox->source() == source;
    });
    came |= source->receive(first == awaited.end() ? nullptr : first->inbox);
  }
  return came;
}

/// Throw if a peer is gone, unless one of the messages came before that.
void WaitSet::check_peers(std::span<const Awaited> awaited, size_t& found, bool is_thorough) {
  for (Source* source : sources_) {
    source->check_failure();
    if (!source->is_peer_gone(is_thorough)) continue;
    if (find(awaited, found)) return;
    source->throw_broken({Kind::peer_lost, source->loss(), source->peer()});
  }
}

void WaitSet::sleep(std::span<const Awaited> awaited, double deadline) {
  if (doorbell_ != nullptr) {
    size_t found;
    const auto is_awake = [&] {
      for (Source* source : sources_) {
        source->check_failure();
        if (source->is_peer_gone(/*is_thorough=*/false)) return true;
      }
      return find(awaited, found);
    };
    doorbell_->sleep(is_awake, std::min(kLifelineSeconds, deadline - monotonic_s()),
                     /*is_shared=*/true);
    return;
  }
  polled_.clear();
  double timeout_s = std::clamp(deadline - monotonic_s(), 0.0, 1e6);
  for (Source* source : sources_) {
    polled_.push_back(source->polled(locks_.emplace_back()));
    if (polled_.back().fd < 0) timeout_s = std::min(timeout_s, kNapSeconds);
  }
  timespec timeout;
  timeout.tv_sec = static_cast<time_t>(timeout_s);
  timeout.tv_nsec = static_cast<long>((timeout_s - static_cast<double>(timeout.tv_sec)) * 1e9);
  ppoll(polled_.data(), polled_.size(), &timeout, nullptr);
  locks_.clear();
}

void WaitSet::overdue(size_t num_awaited) const {
  std::string peers;
  for (const Source* source : sources_) peers += (peers.empty() ? "" : ", ") + source->peer();
  throw TransportFailure(Kind::deadline,
                         "posted none of " + std::to_string(num_awaited) + " messages in time",
                         peers);
}

}  // namespace lamina
