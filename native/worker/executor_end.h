// The model worker's end of the link to one attention executor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "transport/link.h"
#include "worker/rows.h"

namespace lamina {

/// Where the executor's heads lie in a layer's q, k, v and attention output.
struct LayerShare {
  HeadShare q, k, v, out;
};

/// Mailboxes of one micro-batch: their ids and capacities in bytes.
struct StepMailboxes {
  uint16_t q, kv, out;
  size_t q_bytes, kv_bytes, out_bytes;
};

/// Sends q, k and v of a step's layers straight from the slices' tensors into mailbox slots, and
/// hands out the executor's output where it lies. One step at a time per micro-batch; one thread.
class ExecutorEnd {
 public:
  /// The link must outlive this.
  ExecutorEnd(Link& link, std::vector<LayerShare> layers, std::span<const StepMailboxes> mailboxes);

  /// The rows of the micro-batch's next step: those that attend here, and those stored here.
  void begin(int micro_batch, RowSet attending, RowSet stored);

  /// Post the share of q [T, ...] as message `number`. T covers all rows of the step.
  void post_q(int micro_batch, int layer, uint64_t number, const std::byte* q, double deadline);

  /// Post the share of k and v, one after the other.
  void post_kv(int micro_batch, int layer, uint64_t number, const std::byte* k, const std::byte* v,
               double deadline);

  /// The executor's output [A, share of out]: memory of the mailbox, valid until the next call for
  /// the same micro-batch.
  const std::byte* wait_out(int micro_batch, int layer, uint64_t number, double deadline);

  /// Wait for the output and copy it to its rows and heads of out [T, ...].
  void collect_out(int micro_batch, int layer, uint64_t number, std::byte* out, double deadline);

 private:
  struct Channel {
    Outbox* q;
    Outbox* kv;
    Inbox* out;
    RowSet attending;
    RowSet stored;
  };

  std::vector<LayerShare> layers_;
  std::vector<Channel> channels_;
};

}  // namespace lamina
