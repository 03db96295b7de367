#include "attention/paged.h"

#include <algorithm>
#include <cassert>
#include <stdexcept>
#include <string>
#include <utility>

namespace lamina {
namespace {

constexpr float kLog2E = 1.44269504088896f;
constexpr int kMaxHeadDim = 256;

PageLayout layout_of(const LayerSpec& spec, CacheType type, int page_tokens) {
  if (spec.head_dim_k > kMaxHeadDim || spec.head_dim_v > kMaxHeadDim) {
    throw std::invalid_argument("head sizes go up to " + std::to_string(kMaxHeadDim));
  }
  return PageLayout(type, spec.kv_heads, spec.head_dim_k, spec.head_dim_v, page_tokens);
}

size_t elements(int heads, int head_dim) {
  return static_cast<size_t>(heads) * static_cast<size_t>(head_dim);
}

}  // namespace

size_t page_bytes(std::span<const LayerSpec> layers, CacheType type, int page_tokens) {
  size_t total = 0;
  for (const LayerSpec& spec : layers) {
    total += layout_of(spec, type, page_tokens).bytes;
  }
  return total;
}

PagedAttention::PagedAttention(std::vector<LayerSpec> layers, Dtype dtype, CacheType type,
                               int64_t num_pages, int page_tokens,
                               std::shared_ptr<ThreadPool> pool, Isa isa)
    : dtype_(dtype),
      type_(type),
      page_stride_(page_bytes(layers, type, page_tokens)),
      pool_(std::move(pool)),
      memory_(page_stride_ * static_cast<size_t>(num_pages), *pool_, "the KV cache"),
      kernels_(kernels_for(isa, type)),
      append_(append_for(type)) {
  size_t offset = 0;
  int max_lines = kTileLines, max_queries = kTileLines;
  for (LayerSpec& spec : layers) {
    const PageLayout layout = layout_of(spec, type, page_tokens);
    const int group = spec.query_heads / spec.kv_heads;
    const LayerKind kind{spec.window, spec.kv_heads, group, layout.dv_padded};
    const auto found = std::find(kinds_.begin(), kinds_.end(), kind);
    const auto index = static_cast<size_t>(found - kinds_.begin());
    if (found == kinds_.end()) kinds_.push_back(kind);
    const bool capped = spec.softcap != 0.0f;
    layers_.push_back({std::move(spec), layout, group, 0.0f, 0.0f, offset, index});
    Layer& layer = layers_.back();
    layer.scale2 = capped ? layer.spec.scale / layer.spec.softcap : layer.spec.scale * kLog2E;
    layer.cap2 = capped ? layer.spec.softcap * kLog2E : 0.0f;
    offset += layout.bytes;
    max_lines = std::max(max_lines, group);
    max_queries = std::max(max_queries, layer.spec.query_heads);
  }
  constexpr size_t kLine = 64;
  for (int thread = 0; thread < pool_->num_threads(); ++thread) {
    scratch_memory_.push_back(
        std::make_unique<std::byte[]>(Scratch::num_bytes(max_lines, max_queries) + kLine));
    const auto address = reinterpret_cast<uintptr_t>(scratch_memory_.back().get());
    scratch_.push_back(Scratch::at(
        reinterpret_cast<std::byte*>((address + kLine - 1) / kLine * kLine), max_lines,
        max_queries));
  }
}

std::shared_ptr<StepSchedule> PagedAttention::begin(const StepLanes& lanes) {
  return std::make_shared<StepSchedule>(lanes, kinds_, pool_->num_threads(), buffers_);
}

size_t PagedAttention::q_bytes(const StepSchedule& step, int layer) const {
  const LayerSpec& spec = layer_at(layer).spec;
  return static_cast<size_t>(step.num_attending_rows()) *
         elements(spec.query_heads, spec.head_dim_k) * item_bytes(dtype_);
}
size_t PagedAttention::k_bytes(const StepSchedule& step, int layer) const {
  const LayerSpec& spec = layer_at(layer).spec;
  return static_cast<size_t>(step.num_stored_rows()) * elements(spec.kv_heads, spec.head_dim_k) *
         item_bytes(dtype_);
}
size_t PagedAttention::v_bytes(const StepSchedule& step, int layer) const {
  const LayerSpec& spec = layer_at(layer).spec;
  return static_cast<size_t>(step.num_stored_rows()) * elements(spec.kv_heads, spec.head_dim_v) *
         item_bytes(dtype_);
}
size_t PagedAttention::out_bytes(const StepSchedule& step, int layer) const {
  const LayerSpec& spec = layer_at(layer).spec;
  const auto rows = static_cast<size_t>(step.num_attending_rows());
  const size_t outputs = rows * elements(spec.query_heads, spec.head_dim_v);
  if (!step.is_partial()) return outputs * item_bytes(dtype_);
  return (outputs + rows * static_cast<size_t>(spec.query_heads)) * sizeof(float);
}

LayerPages PagedAttention::pages_of(const Layer& layer, const int32_t* pages) const {
  return {&layer.layout, memory_.data() + layer.offset, page_stride_, pages};
}

/// For the queries of `head` in the rows of `tile`; range and state are still to be set.
AttendArgs PagedAttention::attend_args(const StepSchedule& step, const Layer& layer,
                                       const StepSchedule::Tile& tile, int head,
                                       int thread) const {
  const StepSchedule::Lane& lane = step.lane(tile.lane);
  const size_t item = item_bytes(dtype_);
  AttendArgs args;
  args.pages = pages_of(layer, lane.pages);
  args.dtype = dtype_;
  args.q_row_bytes = elements(layer.spec.query_heads, layer.spec.head_dim_k) * item;
  args.q = step.q + static_cast<size_t>(lane.first_attending_row + tile.first_row) * args.q_row_bytes +
           elements(head * layer.group, layer.spec.head_dim_k) * item;
  args.q_head_bytes = elements(layer.group, layer.spec.head_dim_k) * item;
  args.num_rows = tile.num_rows;
  args.group = layer.group;
  args.first_head = head;
  args.num_heads = 1;
  args.first_position = lane.first_position + tile.first_row;
  args.window = layer.spec.window;
  args.scale2 = layer.scale2;
  args.cap2 = layer.cap2;
  args.scratch = scratch_[static_cast<size_t>(thread)];
  return args;
}

/// item(index, thread) for all items, in pieces.
template <typename Item>
void PagedAttention::run_pieces(StepSchedule& step, const std::vector<int>& pieces, Item&& item) {
  const auto run_piece = [&](int piece, int thread) {
    const int begin = piece == 0 ? 0 : pieces[static_cast<size_t>(piece) - 1];
    for (int i = begin; i < pieces[static_cast<size_t>(piece)]; ++i) {
      item(static_cast<size_t>(i), thread);
    }
  };
  const int count = static_cast<int>(pieces.size());
  if (count < 2 || pool_->num_threads() == 1) {
    for (int piece = 0; piece < count; ++piece) run_piece(piece, 0);
    return;
  }
  step.restart_pieces();
  pool_->run([&](int thread) {
    for (int piece = step.take_piece(); piece < count; piece = step.take_piece()) {
      run_piece(piece, thread);
    }
  });
}

void PagedAttention::attend_cached(StepSchedule& step, int layer_index, const std::byte* q) {
  const Layer& layer = layer_at(layer_index);
  step.q = q;
  step.layer = layer_index;
  run_pieces(step, step.work(layer.kind).task_pieces,
             [&](size_t index, int thread) { run_task(step, layer, index, thread); });
}

void PagedAttention::run_task(StepSchedule& step, const Layer& layer, size_t index, int thread) {
  const StepSchedule::Work& work = step.work(layer.kind);
  const StepSchedule::Task& task = work.tasks[index];
  const StepSchedule::Tile& tile = work.tiles[static_cast<size_t>(task.tile)];
  AttendArgs args = attend_args(step, layer, tile, tile.head, thread);
  args.begin = task.begin;
  args.end = task.end;
  args.num_heads = tile.num_heads;
  const int lines = tile.num_rows * layer.group;
  const size_t state_floats = State::num_floats(lines, layer.layout.dv_padded);
  float* partial = step.partials() + task.partial;
  args.state = State::at(partial, lines, layer.layout.dv_padded);
  for (int head = 0; head < tile.num_heads; ++head, partial += state_floats) {
    clear_state(State::at(partial, lines, layer.layout.dv_padded), lines, layer.layout.dv_padded);
  }
  kernels_.attend(args);
}

void PagedAttention::finish(StepSchedule& step, int layer_index, const std::byte* k,
                            const std::byte* v, std::byte* out) {
  const Layer& layer = layer_at(layer_index);
  const StepSchedule::Work& work = step.work(layer.kind);
  assert(work.tiles.empty() || step.layer == layer_index);
  run_pieces(step, work.store_pieces, [&](size_t index, int) {
    store(step, layer, work.stores[index].lane, work.stores[index].head, k, v);
  });
  run_pieces(step, work.tile_pieces, [&](size_t index, int thread) {
    const StepSchedule::Tile& tile = work.tiles[index];
    for (int head = 0; head < tile.num_heads; ++head) {
      finish_head(step, layer, tile, head, k, v, out, thread);
    }
  });
  step.layer = -1;
  step.num_layers_done = layer_index + 1;
  step.is_over = step.num_layers_done == num_layers();
}

void PagedAttention::finish_head(StepSchedule& step, const Layer& layer,
                                 const StepSchedule::Tile& tile, int head_of_tile,
                                 const std::byte* k, const std::byte* v, std::byte* out,
                                 int thread) {
  const StepSchedule::Lane& lane = step.lane(tile.lane);
  const int head = tile.head + head_of_tile;
  if (lane.is_stored_late()) store(step, layer, tile.lane, head, k, v);
  const int lines = tile.num_rows * layer.group;
  const int dv_padded = layer.layout.dv_padded;
  State state;
  if (tile.num_partials == 0) {
    state = State::at(scratch_[static_cast<size_t>(thread)].state, lines, dv_padded);
    clear_state(state, lines, dv_padded);
  } else {
    const size_t state_floats = State::num_floats(lines, dv_padded);
    float* partial =
        step.partials() + tile.partial + static_cast<size_t>(head_of_tile) * state_floats;
    state = State::at(partial, lines, dv_padded);
    for (int i = 1; i < tile.num_partials; ++i) {
      partial += static_cast<size_t>(tile.num_heads) * state_floats;
      kernels_.merge(state, State::at(partial, lines, dv_padded), lines, dv_padded);
    }
  }
  if (lane.num_stored != 0) attend_stored(step, layer, tile, head, state, thread);
  write(step, layer, tile, head, state, out);
}

void PagedAttention::store(const StepSchedule& step, const Layer& layer, int lane_index, int head,
                           const std::byte* k, const std::byte* v) const {
  const StepSchedule::Lane& lane = step.lane(lane_index);
  if (lane.is_revoked) return;
  const size_t item = item_bytes(dtype_);
  const auto first = static_cast<size_t>(lane.first_stored_row);
  AppendArgs args;
  args.pages = pages_of(layer, lane.pages);
  args.head = head;
  args.first_token = lane.context_tokens;
  args.num_tokens = lane.num_stored;
  args.dtype = dtype_;
  args.k_row_bytes = elements(layer.spec.kv_heads, layer.spec.head_dim_k) * item;
  args.v_row_bytes = elements(layer.spec.kv_heads, layer.spec.head_dim_v) * item;
  args.k = k + first * args.k_row_bytes + elements(head, layer.spec.head_dim_k) * item;
  args.v = v + first * args.v_row_bytes + elements(head, layer.spec.head_dim_v) * item;
  append_(args);
}

/// The rows attend to each other and to themselves.
void PagedAttention::attend_stored(StepSchedule& step, const Layer& layer,
                                   const StepSchedule::Tile& tile, int head, const State& state,
                                   int thread) const {
  const StepSchedule::Lane& lane = step.lane(tile.lane);
  AttendArgs args = attend_args(step, layer, tile, head, thread);
  args.begin = lane.context_tokens;
  args.end = lane.context_tokens + tile.first_row + tile.num_rows;
  args.state = state;
  kernels_.attend(args);
}

void PagedAttention::write(const StepSchedule& step, const Layer& layer,
                           const StepSchedule::Tile& tile, int head, const State& state,
                           std::byte* out) const {
  const StepSchedule::Lane& lane = step.lane(tile.lane);
  const LayerSpec& spec = layer.spec;
  const auto row = static_cast<size_t>(lane.first_attending_row + tile.first_row);
  const int query_head = head * layer.group;
  const auto query_heads = static_cast<size_t>(spec.query_heads);
  const bool has_sinks = !spec.sinks.empty() && lane.num_stored != 0;
  WriteArgs to;
  to.state = state;
  to.num_rows = tile.num_rows;
  to.group = layer.group;
  to.dv = spec.head_dim_v;
  to.dv_padded = layer.layout.dv_padded;
  to.sinks = has_sinks ? spec.sinks.data() + lane.heads * spec.query_heads + query_head : nullptr;
  to.dtype = step.is_partial() ? Dtype::float32 : dtype_;
  to.out_row_bytes = elements(spec.query_heads, spec.head_dim_v) * item_bytes(to.dtype);
  to.out = out + row * to.out_row_bytes + elements(query_head, spec.head_dim_v) * item_bytes(to.dtype);
  to.lse = nullptr;
  to.lse_row_stride = query_heads;
  if (step.is_partial()) {
    const size_t outputs = static_cast<size_t>(step.num_attending_rows()) * to.out_row_bytes;
    to.lse = reinterpret_cast<float*>(out + outputs) + row * query_heads + query_head;
  }
  kernels_.write(to);
}

}  // namespace lamina
