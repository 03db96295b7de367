// The model worker's end of the link to one attention executor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "transport/link.h"
#include "worker/pieces.h"

namespace lamina {

/// Sizes of one head unit in a layer: bytes per row of q, k, v and the attention output.
struct LayerUnit {
  size_t q_bytes, k_bytes, v_bytes, out_bytes;
  int64_t num_query_heads;
  int64_t head_dim_v;
};

/// Mailboxes of one micro-batch: their ids and capacities in bytes.
struct StepMailboxes {
  uint16_t q, kv, out;
  size_t q_bytes, kv_bytes, out_bytes;
};

/// An executor's output over its own tokens only, in its mailbox.
struct PartialOutput {
  const float* out;  // [cells, query heads of a unit, head_dim_v]
  const float* lse;  // [cells, query heads of a unit]
};

/// Sends q, k and v of a step's layers straight from the slices' tensors into mailbox slots, and
/// hands out the executor's output where it lies. One step at a time per micro-batch; one thread.
class ExecutorEnd {
 public:
  /// The links must outlive this. `out_link`: where outputs come from, `link` itself unless another
  /// replica's executor sends them. `num_units`: of every row; `page_units`: of the executor's lanes.
  ExecutorEnd(Link& link, Link& out_link, std::vector<LayerUnit> layers, int64_t num_units, int64_t page_units,
              std::span<const StepMailboxes> mailboxes);

  /// The micro-batch's next step: what attends here, what is stored here, and whether the outputs are
  /// partial (float32, with LSE).
  void begin(int micro_batch, std::span<const Piece> attending, std::span<const Piece> stored,
             bool is_partial);

  /// Post the executor's part of q [T, ...] as message `number`. T covers all rows of the step.
  void post_q(int micro_batch, int layer, uint64_t number, const std::byte* q, double deadline);

  /// Post its part of k and v, one after the other.
  void post_kv(int micro_batch, int layer, uint64_t number, const std::byte* k, const std::byte* v,
               double deadline);

  /// Whether the output is here, or none will come. Never blocks.
  bool has_out(int micro_batch, uint64_t number);

  /// The executor's output: memory of the mailbox, valid until the next call for the same micro-batch.
  const std::byte* wait_out(int micro_batch, int layer, uint64_t number, double deadline);

  /// The same where outputs are partial.
  PartialOutput wait_partial(int micro_batch, int layer, uint64_t number, double deadline);

  /// Wait for the output and copy it to its rows and heads of out [T, ...].
  void collect_out(int micro_batch, int layer, uint64_t number, std::byte* out, double deadline);

  /// The mailbox of the outputs.
  Inbox& out_inbox(int micro_batch) { return *channels_.at(micro_batch).out; }

  /// What attends here in the micro-batch's present step.
  const Pieces& attending(int micro_batch) const { return channels_[micro_batch].attending; }

 private:
  struct Channel {
    Outbox* q;
    Outbox* kv;
    Inbox* out;
    Pieces attending;
    Pieces stored;
    bool is_partial = false;
  };

  std::vector<LayerUnit> layers_;
  int64_t num_units_;
  int64_t page_units_;
  std::vector<Channel> channels_;
};

}  // namespace lamina
