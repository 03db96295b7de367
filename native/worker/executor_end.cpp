#include "worker/executor_end.h"

namespace lamina {

ExecutorEnd::ExecutorEnd(Link& link, std::vector<LayerShare> layers,
                         std::span<const StepMailboxes> mailboxes)
    : layers_(std::move(layers)) {
  for (const StepMailboxes& boxes : mailboxes) {
    Channel channel;
    channel.q = &link.outbox(boxes.q, boxes.q_bytes);
    channel.kv = &link.outbox(boxes.kv, boxes.kv_bytes);
    channel.out = &link.inbox(boxes.out, boxes.out_bytes);
    channels_.push_back(std::move(channel));
  }
}

void ExecutorEnd::begin(int micro_batch, RowSet attending, RowSet stored) {
  Channel& channel = channels_.at(micro_batch);
  channel.attending = std::move(attending);
  channel.stored = std::move(stored);
}

void ExecutorEnd::post_q(int micro_batch, int layer, uint64_t number, const std::byte* q,
                         double deadline) {
  Channel& channel = channels_[micro_batch];
  const HeadShare& share = layers_[layer].q;
  std::byte* slot = channel.q->reserve(number, channel.attending.size() * share.bytes, deadline);
  gather_rows(q, share, channel.attending, slot);
  channel.q->commit(deadline);
}

void ExecutorEnd::post_kv(int micro_batch, int layer, uint64_t number, const std::byte* k,
                          const std::byte* v, double deadline) {
  Channel& channel = channels_[micro_batch];
  const LayerShare& share = layers_[layer];
  const size_t num_bytes = channel.stored.size() * (share.k.bytes + share.v.bytes);
  std::byte* slot = channel.kv->reserve(number, num_bytes, deadline);
  slot = gather_rows(k, share.k, channel.stored, slot);
  gather_rows(v, share.v, channel.stored, slot);
  channel.kv->commit(deadline);
}

const std::byte* ExecutorEnd::wait_out(int micro_batch, int layer, uint64_t number,
                                       double deadline) {
  Channel& channel = channels_[micro_batch];
  const size_t num_bytes = channel.attending.size() * layers_[layer].out.bytes;
  return channel.out->wait(number, deadline, num_bytes).data();
}

void ExecutorEnd::collect_out(int micro_batch, int layer, uint64_t number, std::byte* out,
                              double deadline) {
  const std::byte* packed = wait_out(micro_batch, layer, number, deadline);
  scatter_rows(packed, layers_[layer].out, channels_[micro_batch].attending, out);
}

}  // namespace lamina
