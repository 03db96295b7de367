// The attention worker's layer loop: all layers of all steps in flight, without the interpreter.
//
//   wait for q of any step that is due -> attend over cached tokens
//   wait for k and v                   -> append, attend to them, merge, post the output
//
// A *channel* is one tensor-parallel rank of one micro-batch. With several replicas of the model its
// layers come and go over several links in turn (docs/parallelism.md); plans and reports have a link
// of their own then. The control plane adds a step when its plan has come and is called again when
// the next plan is there. The same loop serves the local executor, pumped by the model worker's own
// wait.
//
// Of what is here, k and v come first (they end a layer), then plans, then the q that waits longest.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "attention/executor.h"
#include "transport/wait_any.h"

namespace lamina {

class LayerLoop {
 public:
  /// Mailboxes of a channel at one replica.
  struct Boxes {
    Inbox* q;
    Inbox* kv;
    Outbox* out;
  };
  /// q, k and v of layer l come through boxes[l mod R], the output goes through boxes[(l + 1) mod R].
  /// Layers `first_layer`, `first_layer + layer_step`, ... are served here; the executors of other
  /// model ranks have the others.
  struct Channel {
    std::vector<Boxes> boxes;
    Outbox* report;
    int first_layer = 0;
    int layer_step = 1;
  };

  /// All of these must outlive this.
  /// `plans`: the mailbox whose next message makes `serve` return.
  LayerLoop(AttentionExecutor& executor, Inbox& plans, std::vector<Channel> channels,
            double step_deadline_s);

  /// Serve a step with message numbers `first_message`, `first_message` + 1, ... for its layers and
  /// `number` for its report. A step of the same channel that is still in progress was given up and is
  /// forgotten; if it only stores, it is served as far as its messages still come.
  void add(size_t channel, uint64_t number, uint64_t first_message,
           std::shared_ptr<StepSchedule> schedule);

  /// Serve layers until plan number `next_plan` is here (true), or until there is nothing to do at
  /// `wake_at` or later (false).
  /// Throws TransportFailure; `deadline` when the model worker fell silent in a step.
  bool serve(uint64_t next_plan, double wake_at);

  /// Serve the next message, for a link whose other end runs in this very thread.
  /// Throws TransportFailure (deadline) if none is here.
  void pump();

 private:
  /// When what happened in one layer, in seconds of `monotonic_s()`.
  struct LayerTimes {
    double attend_begin;  // q was here
    double attend_end;
    double finish_begin;  // k and v were here
    double finish_end;    // the output is posted
  };
  struct Step {
    std::shared_ptr<StepSchedule> schedule;
    uint64_t number = 0;
    uint64_t message = 0;  // of the present layer
    int layer = 0;
    bool has_q = false;
    bool is_superseded = false;  // there is a later step of the channel
    bool is_stale = false;       // its next message can no longer come
    double deadline = 0.0;
    std::vector<LayerTimes> times;
  };
  struct Served {
    Channel channel;
    std::vector<Step> steps;  // oldest first

    const Boxes& boxes(int layer) const {
      return channel.boxes[static_cast<size_t>(layer) % channel.boxes.size()];
    }
  };
  struct Due {
    Served* served;
    Step* step;
    Inbox* inbox;

    bool is_here() const { return inbox->holds(step->message); }
  };

  double collect_due();
  const Due* first_here(bool has_q) const;
  void advance(const Due& due);
  void cannot_come(const Due& due);
  void receive_q(const Due& due);
  void receive_kv(const Due& due);
  void finish(const Due& due, const std::byte* k, const std::byte* v);
  void expect_layer(Step& step);
  void post_report(Served& served, const Step& step);
  static void end(const Due& due);

  AttentionExecutor& executor_;
  Inbox& plans_;
  double step_deadline_s_;
  std::vector<Served> channels_;
  WaitSet links_;
  std::vector<Awaited> awaited_;
  std::vector<Due> due_;
};

}  // namespace lamina
