#include "worker/executor_end.h"

namespace lamina {

ExecutorEnd::ExecutorEnd(Link& link, std::vector<LayerUnit> layers, int64_t num_units,
                         int64_t page_units, std::span<const StepMailboxes> mailboxes)
    : layers_(std::move(layers)), num_units_(num_units), page_units_(page_units) {
  for (const StepMailboxes& boxes : mailboxes) {
    Channel channel;
    channel.q = &link.outbox(boxes.q, boxes.q_bytes);
    channel.kv = &link.outbox(boxes.kv, boxes.kv_bytes);
    channel.out = &link.inbox(boxes.out, boxes.out_bytes);
    channels_.push_back(std::move(channel));
  }
}

void ExecutorEnd::begin(int micro_batch, std::span<const Piece> attending,
                        std::span<const Piece> stored, bool is_partial) {
  Channel& channel = channels_.at(micro_batch);
  channel.attending = Pieces(attending, num_units_, page_units_);
  channel.stored = Pieces(stored, num_units_, page_units_);
  channel.is_partial = is_partial;
}

void ExecutorEnd::post_q(int micro_batch, int layer, uint64_t number, const std::byte* q,
                         double deadline) {
  Channel& channel = channels_[micro_batch];
  const size_t unit_bytes = layers_[layer].q_bytes;
  const size_t num_bytes = channel.attending.num_cells() * unit_bytes;
  channel.attending.gather(q, unit_bytes, channel.q->reserve(number, num_bytes, deadline));
  channel.q->commit(deadline);
}

void ExecutorEnd::post_kv(int micro_batch, int layer, uint64_t number, const std::byte* k,
                          const std::byte* v, double deadline) {
  Channel& channel = channels_[micro_batch];
  const LayerUnit& unit = layers_[layer];
  const size_t num_bytes = channel.stored.num_cells() * (unit.k_bytes + unit.v_bytes);
  std::byte* slot = channel.kv->reserve(number, num_bytes, deadline);
  slot = channel.stored.gather(k, unit.k_bytes, slot);
  channel.stored.gather(v, unit.v_bytes, slot);
  channel.kv->commit(deadline);
}

bool ExecutorEnd::has_out(int micro_batch, uint64_t number) {
  Channel& channel = channels_[micro_batch];
  return channel.attending.num_cells() == 0 || channel.out->holds(number);
}

const std::byte* ExecutorEnd::wait_out(int micro_batch, int layer, uint64_t number,
                                       double deadline) {
  Channel& channel = channels_[micro_batch];
  const LayerUnit& unit = layers_[layer];
  const size_t cell_bytes =
      channel.is_partial ? unit.num_query_heads * (unit.head_dim_v + 1) * sizeof(float)
                         : unit.out_bytes;
  return channel.out->wait(number, deadline, channel.attending.num_cells() * cell_bytes).data();
}

PartialOutput ExecutorEnd::wait_partial(int micro_batch, int layer, uint64_t number,
                                        double deadline) {
  const auto* out =
      reinterpret_cast<const float*>(wait_out(micro_batch, layer, number, deadline));
  const LayerUnit& unit = layers_[layer];
  const int64_t num_cells = channels_[micro_batch].attending.num_cells();
  return {out, out + num_cells * unit.num_query_heads * unit.head_dim_v};
}

void ExecutorEnd::collect_out(int micro_batch, int layer, uint64_t number, std::byte* out,
                              double deadline) {
  const std::byte* packed = wait_out(micro_batch, layer, number, deadline);
  channels_[micro_batch].attending.scatter(packed, layers_[layer].out_bytes, out);
}

}  // namespace lamina
