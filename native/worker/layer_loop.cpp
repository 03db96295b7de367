#include "worker/layer_loop.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "core/wait.h"

namespace lamina {

namespace {

/// The links of all channels; the plans' first.
std::vector<Source*> links_of(Inbox& plans, const std::vector<LayerLoop::Channel>& channels) {
  std::vector<Inbox*> inboxes = {&plans};
  for (const LayerLoop::Channel& channel : channels) {
    for (const LayerLoop::Boxes& boxes : channel.boxes) inboxes.push_back(boxes.q);
  }
  return sources_of(inboxes);
}

}  // namespace

LayerLoop::LayerLoop(AttentionExecutor& executor, Inbox& plans, std::vector<Channel> channels,
                     double step_deadline_s)
    : executor_(executor),
      plans_(plans),
      step_deadline_s_(step_deadline_s),
      links_(links_of(plans, channels)) {
  for (Channel& channel : channels) channels_.push_back({std::move(channel), {}});
}

void LayerLoop::add(size_t channel, uint64_t number, uint64_t first_message,
                    std::shared_ptr<StepSchedule> schedule) {
  Served& served = channels_.at(channel);
  // Without all its outputs the model worker did not end a step: it gave it up. If it waits for none,
  // what is left of it may be on its way, over another link than the plan.
  std::erase_if(served.steps, [](const Step& step) {
    const bool is_given_up = num_attending_rows(*step.schedule) > 0;
    if (is_given_up) end_step(*step.schedule);
    return is_given_up;
  });
  for (Step& step : served.steps) step.is_superseded = true;
  if (num_attending_rows(*schedule) == 0 && num_stored_rows(*schedule) == 0) return;
  Step step;
  step.schedule = std::move(schedule);
  step.number = number;
  step.layer = served.channel.first_layer;
  step.message = first_message + static_cast<uint64_t>(step.layer);
  step.times.resize(static_cast<size_t>(executor_.num_layers()));
  if (step.layer >= executor_.num_layers()) {
    post_report(served, step);
    end_step(*step.schedule);
    return;
  }
  expect_layer(step);
  served.steps.push_back(std::move(step));
}

bool LayerLoop::serve(uint64_t next_plan, double wake_at) {
  while (true) {
    const double overdue_at = collect_due();
    awaited_.push_back({&plans_, next_plan});
    size_t ready;
    try {
      ready = links_.wait(awaited_, std::min(wake_at, overdue_at));
    } catch (const TransportFailure& failure) {
      if (failure.kind != TransportFailure::Kind::deadline || overdue_at <= wake_at) throw;
      return false;
    }
    if (const Due* due = first_here(/*has_q=*/true)) {
      advance(*due);
    } else if (plans_.holds(next_plan)) {
      return true;
    } else if (const Due* due = first_here(/*has_q=*/false)) {
      advance(*due);
    } else if (ready < due_.size()) {
      cannot_come(due_[ready]);
    }
  }
}

void LayerLoop::pump() {
  collect_due();
  const size_t ready = links_.wait(awaited_, monotonic_s());
  const Due* due = first_here(/*has_q=*/true);
  if (due == nullptr) due = first_here(/*has_q=*/false);
  if (due != nullptr) {
    advance(*due);
  } else {
    cannot_come(due_[ready]);
  }
}

/// Collect the next message of every step, the one that waits for longest first; returns when a step
/// is overdue.
double LayerLoop::collect_due() {
  due_.clear();
  awaited_.clear();
  double overdue_at = std::numeric_limits<double>::infinity();
  for (Served& served : channels_) {
    const size_t first = due_.size();
    for (Step& step : served.steps) {
      // One that is superseded may have been given up: nobody need send anything for it.
      if (!step.is_superseded) overdue_at = std::min(overdue_at, step.deadline);
      if (step.is_stale || must_wait(*step.schedule, step.layer)) continue;
      const Boxes& boxes = served.boxes(step.layer);
      Inbox* inbox = step.has_q ? boxes.kv : boxes.q;
      // Waiting for a later message would discard the one that an earlier step waits for.
      const bool is_taken = std::any_of(due_.begin() + static_cast<ptrdiff_t>(first), due_.end(),
                                        [&](const Due& due) { return due.inbox == inbox; });
      if (!is_taken) due_.push_back({&served, &step, inbox});
    }
  }
  std::sort(due_.begin(), due_.end(), [](const Due& a, const Due& b) {
    return a.step->has_q != b.step->has_q ? a.step->has_q : a.step->deadline < b.step->deadline;
  });
  for (const Due& due : due_) awaited_.push_back({due.inbox, due.step->message});
  return overdue_at;
}

/// The first step whose message is here, among those that have their q or those that wait for it.
const LayerLoop::Due* LayerLoop::first_here(bool has_q) const {
  for (const Due& due : due_) {
    if (due.step->has_q == has_q && due.is_here()) return &due;
  }
  return nullptr;
}

void LayerLoop::advance(const Due& due) {
  if (due.step->has_q) {
    receive_kv(due);
  } else {
    receive_q(due);
  }
}

/// A later message is in the place of the one that the step waits for.
void LayerLoop::cannot_come(const Due& due) {
  Step& step = *due.step;
  if (step.is_superseded) {
    end(due);
  } else if (&due.inbox->source() != &plans_.source()) {
    step.is_stale = true;  // the plan of the step that supersedes it is on its way
  } else {
    due.inbox->wait(step.message, step.deadline, std::nullopt);  // throws: it is the peer's mistake
  }
}

void LayerLoop::expect_layer(Step& step) {
  step.deadline = monotonic_s() + step_deadline_s_;
  // Without rows that attend there is no q to wait for.
  step.has_q = num_attending_rows(*step.schedule) == 0;
}

void LayerLoop::receive_q(const Due& due) {
  Step& step = *due.step;
  LayerTimes& times = step.times[static_cast<size_t>(step.layer)];
  const size_t num_bytes = executor_.q_bytes(*step.schedule, step.layer);
  const std::byte* q = due.inbox->wait(step.message, step.deadline, num_bytes).data();
  times.attend_begin = monotonic_s();
  executor_.attend_cached(*step.schedule, step.layer, q);
  times.attend_end = monotonic_s();
  step.has_q = true;
  if (num_stored_rows(*step.schedule) == 0) {
    times.finish_begin = times.attend_end;
    finish(due, nullptr, nullptr);
  }
}

void LayerLoop::receive_kv(const Due& due) {
  Step& step = *due.step;
  LayerTimes& times = step.times[static_cast<size_t>(step.layer)];
  const size_t k_bytes = executor_.k_bytes(*step.schedule, step.layer);
  const size_t v_bytes = executor_.v_bytes(*step.schedule, step.layer);
  const std::byte* k = due.inbox->wait(step.message, step.deadline, k_bytes + v_bytes).data();
  times.finish_begin = monotonic_s();
  if (num_attending_rows(*step.schedule) == 0) {
    times.attend_begin = times.attend_end = times.finish_begin;
  }
  finish(due, k, k + k_bytes);
}

void LayerLoop::finish(const Due& due, const std::byte* k, const std::byte* v) {
  Step& step = *due.step;
  if (num_attending_rows(*step.schedule) > 0) {
    Outbox& outbox = *due.served->boxes(step.layer + 1).out;
    const size_t num_bytes = executor_.out_bytes(*step.schedule, step.layer);
    std::byte* out = outbox.reserve(step.message, num_bytes, step.deadline);
    executor_.finish(*step.schedule, step.layer, k, v, out);
    outbox.commit(step.deadline);
  } else {
    executor_.finish(*step.schedule, step.layer, k, v, nullptr);
  }
  step.times[static_cast<size_t>(step.layer)].finish_end = monotonic_s();
  const int layer_step = due.served->channel.layer_step;
  step.message += static_cast<uint64_t>(layer_step);
  step.layer += layer_step;
  if (step.layer < executor_.num_layers()) {
    expect_layer(step);
  } else {
    post_report(*due.served, step);
    end(due);
  }
}

void LayerLoop::post_report(Served& served, const Step& step) {
  static_assert(sizeof(LayerTimes) == 4 * sizeof(double));
  Outbox& outbox = *served.channel.report;
  if (!outbox.has_room()) return;
  const size_t num_bytes = step.times.size() * sizeof(LayerTimes);
  std::byte* slot = outbox.reserve(step.number, num_bytes, step.deadline);
  std::memcpy(slot, step.times.data(), num_bytes);
  outbox.commit(step.deadline);
}

void LayerLoop::end(const Due& due) {
  end_step(*due.step->schedule);
  std::vector<Step>& steps = due.served->steps;
  steps.erase(steps.begin() + (due.step - steps.data()));
}

}  // namespace lamina
