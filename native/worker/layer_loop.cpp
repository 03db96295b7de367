#include "worker/layer_loop.h"

#include <algorithm>
#include <limits>

#include "core/wait.h"

namespace lamina {

LayerLoop::LayerLoop(Link& link, AttentionExecutor& executor, Inbox* plans,
                     std::span<const StepMailboxes> mailboxes, double step_deadline_s)
    : link_(link), executor_(executor), plans_(plans), step_deadline_s_(step_deadline_s) {
  for (const StepMailboxes& boxes : mailboxes) {
    Step step;
    step.q = &link.inbox(boxes.q, boxes.q_bytes);
    step.kv = &link.inbox(boxes.kv, boxes.kv_bytes);
    step.out = &link.outbox(boxes.out, boxes.out_bytes);
    steps_.push_back(std::move(step));
  }
  awaited_.reserve(steps_.size() + 1);
  due_.reserve(steps_.size());
  events_.resize(kNumEvents);
}

void LayerLoop::add(int micro_batch, uint64_t first_number,
                    std::shared_ptr<StepSchedule> schedule) {
  Step& step = steps_.at(micro_batch);
  step.schedule = num_rows(*schedule) > 0 ? std::move(schedule) : nullptr;
  step.number = first_number;
  step.layer = 0;
  expect_layer(step);
}

bool LayerLoop::in_step() const {
  return std::any_of(steps_.begin(), steps_.end(),
                     [](const Step& step) { return step.schedule != nullptr; });
}

bool LayerLoop::serve(uint64_t next_plan, double wake_at) {
  while (true) {
    const double overdue_at = collect_awaited();
    awaited_.push_back({plans_, next_plan});
    size_t ready;
    try {
      ready = link_.wait_any(awaited_, std::min(wake_at, overdue_at));
    } catch (const TransportFailure& failure) {
      if (failure.kind != TransportFailure::Kind::deadline || overdue_at <= wake_at) throw;
      return false;
    }
    // The model worker runs ahead where it waits for no output: its next plan may be here before
    // the layers of the last step are served. What was posted before a plan is here when the plan
    // is. If what a step waits for is not, the step was given up, or the plan is of another one.
    const auto has_come = [](const Step* step) {
      return (step->has_q ? step->kv : step->q)->holds(step->number);
    };
    const auto next = std::find_if(due_.begin(), due_.end(), has_come);
    if (next != due_.end()) {
      advance(**next);
    } else if (plans_->holds(next_plan)) {
      return true;
    } else if (ready < due_.size()) {
      advance(*due_[ready]);  // fails: its message can no longer come
    }
  }
}

void LayerLoop::pump() {
  collect_awaited();
  const size_t ready = link_.wait_any(awaited_, monotonic_s());
  advance(*due_[ready]);
}

std::vector<LayerEvent> LayerLoop::events() const {
  const size_t count = std::min(num_events_, kNumEvents);
  std::vector<LayerEvent> events;
  for (size_t i = num_events_ - count; i < num_events_; ++i) {
    events.push_back(events_[i % kNumEvents]);
  }
  return events;
}

/// Collect the next message of every step, the one that waits for longest first; returns when a step
/// is overdue.
double LayerLoop::collect_awaited() {
  due_.clear();
  awaited_.clear();
  for (Step& step : steps_) {
    if (step.schedule) due_.push_back(&step);
  }
  // Steps that wait for k and v were begun before those that wait for q, and are over sooner.
  std::sort(due_.begin(), due_.end(), [](const Step* a, const Step* b) {
    return a->has_q != b->has_q ? a->has_q : a->deadline < b->deadline;
  });
  for (const Step* step : due_) {
    awaited_.push_back({step->has_q ? step->kv : step->q, step->number});
  }
  double overdue_at = std::numeric_limits<double>::infinity();
  for (const Step* step : due_) overdue_at = std::min(overdue_at, step->deadline);
  return overdue_at;
}

void LayerLoop::expect_layer(Step& step) {
  step.deadline = monotonic_s() + step_deadline_s_;
  step.event = LayerEvent{step.number, 0.0, 0.0, 0.0, 0.0};
  // Without rows that attend there is no q to wait for.
  step.has_q = step.schedule && num_attending_rows(*step.schedule) == 0;
}

void LayerLoop::advance(Step& step) {
  if (step.has_q) {
    receive_kv(step);
  } else {
    receive_q(step);
  }
}

void LayerLoop::receive_q(Step& step) {
  const size_t num_bytes =
      num_attending_rows(*step.schedule) * executor_.q_row_bytes(step.layer);
  const std::byte* q = step.q->wait(step.number, step.deadline, num_bytes).data();
  step.event.attend_begin = monotonic_s();
  executor_.attend_cached(*step.schedule, step.layer, q);
  step.event.attend_end = monotonic_s();
  times_.attend_s += step.event.attend_end - step.event.attend_begin;
  step.has_q = true;
}

void LayerLoop::receive_kv(Step& step) {
  const int64_t rows = num_rows(*step.schedule);
  const int64_t attending = num_attending_rows(*step.schedule);
  const size_t k_bytes = rows * executor_.k_row_bytes(step.layer);
  const size_t v_bytes = rows * executor_.v_row_bytes(step.layer);
  const std::byte* k = step.kv->wait(step.number, step.deadline, k_bytes + v_bytes).data();
  std::byte* out = nullptr;
  if (attending > 0) {
    out = step.out->reserve(step.number, attending * executor_.out_row_bytes(step.layer),
                            step.deadline);
  }
  step.event.finish_begin = monotonic_s();
  executor_.finish(*step.schedule, step.layer, k, k + k_bytes, out);
  if (attending > 0) step.out->commit(step.deadline);
  step.event.finish_end = monotonic_s();
  times_.finish_s += step.event.finish_end - step.event.finish_begin;
  events_[num_events_++ % kNumEvents] = step.event;
  ++step.number;
  if (++step.layer == executor_.num_layers()) step.schedule = nullptr;
  expect_layer(step);
}

}  // namespace lamina
