// The attention worker's layer loop: all layers of all steps in flight, without the interpreter.
//
//   wait for q of any step that is due -> attend over cached tokens
//   wait for k and v                   -> append, attend to them, merge, post the output
//
// The control plane adds a step when its plan has come and is called again when the next plan is
// there. The same loop serves the local executor, pumped by the model worker's own wait.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "attention/executor.h"
#include "transport/link.h"
#include "worker/executor_end.h"

namespace lamina {

/// When what happened in one layer of one step, in seconds of `monotonic_s()`.
struct LayerEvent {
  uint64_t number;
  double attend_begin;  // q was here
  double attend_end;
  double finish_begin;  // k and v were here
  double finish_end;    // the output is posted
};

/// Seconds that the loop spent, summed.
struct LoopTimes {
  double attend_s = 0.0;
  double finish_s = 0.0;
};

class LayerLoop {
 public:
  /// Link and executor must outlive this.
  /// `plans`: the mailbox whose next message makes `serve` return; null: `serve` is not used.
  LayerLoop(Link& link, AttentionExecutor& executor, Inbox* plans,
            std::span<const StepMailboxes> mailboxes, double step_deadline_s);

  /// Serve a step: message numbers of its layers are `first_number`, `first_number` + 1, ...
  /// A step of the same micro-batch that is still in progress was given up and is forgotten.
  void add(int micro_batch, uint64_t first_number, std::shared_ptr<StepSchedule> schedule);

  bool in_step() const;

  /// Serve layers until plan number `next_plan` is here (true), or until there is nothing to do at
  /// `wake_at` or later (false).
  /// Throws TransportFailure; `deadline` when the model worker fell silent in a step.
  bool serve(uint64_t next_plan, double wake_at);

  /// Serve whatever messages are here now, for a link whose other end runs in this very thread.
  /// Throws TransportFailure (deadline) if nothing is.
  void pump();

  const LoopTimes& times() const { return times_; }

  /// The last events, oldest first; at most `kNumEvents`.
  std::vector<LayerEvent> events() const;

  static constexpr size_t kNumEvents = 4096;

 private:
  struct Step {
    Inbox* q;
    Inbox* kv;
    Outbox* out;
    std::shared_ptr<StepSchedule> schedule;  // null: no step in progress
    uint64_t number = 0;                     // of the present layer's messages
    int layer = 0;
    bool has_q = false;
    double deadline = 0.0;
    LayerEvent event{};
  };

  void expect_layer(Step& step);
  void advance(Step& step);
  void receive_q(Step& step);
  void receive_kv(Step& step);
  double collect_awaited();

  Link& link_;
  AttentionExecutor& executor_;
  Inbox* plans_;
  double step_deadline_s_;
  std::vector<Step> steps_;
  std::vector<Awaited> awaited_;
  std::vector<Step*> due_;
  LoopTimes times_;
  std::vector<LayerEvent> events_;
  size_t num_events_ = 0;
};

}  // namespace lamina
