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

std::shared_ptr<StepSchedule> PagedAttention::begin(const StepSpans& spans) {
  return std::make_shared<StepSchedule>(spans, kinds_, pool_->num_threads(), buffers_);
}

size_t PagedAttention::q_row_bytes(int layer) const {
  const LayerSpec& spec = layer_at(layer).spec;
  return elements(spec.query_heads, spec.head_dim_k) * item_bytes(dtype_);
}
size_t PagedAttention::k_row_bytes(int layer) const {
  const LayerSpec& spec = layer_at(layer).spec;
  return elements(spec.kv_heads, spec.head_dim_k) * item_bytes(dtype_);
}
size_t PagedAttention::v_row_bytes(int layer) const {
  const LayerSpec& spec = layer_at(layer).spec;
  return elements(spec.kv_heads, spec.head_dim_v) * item_bytes(dtype_);
}
size_t PagedAttention::out_row_bytes(int layer) const {
  const LayerSpec& spec = layer_at(layer).spec;
  return elements(spec.query_heads, spec.head_dim_v) * item_bytes(dtype_);
}

LayerPages PagedAttention::pages_of(const Layer& layer, const int32_t* pages) const {
  return {&layer.layout, memory_.data() + layer.offset, page_stride_, pages};
}

/// For the queries of `head` from row `row` of q [A, Hq, Dk] on; range and state are still to be set.
AttendArgs PagedAttention::attend_args(const Layer& layer, int head, const int32_t* pages,
                                       const std::byte* q, int64_t row, int num_rows,
                                       int thread) const {
  const size_t item = item_bytes(dtype_);
  AttendArgs args;
  args.pages = pages_of(layer, pages);
  args.dtype = dtype_;
  args.q_row_bytes = elements(layer.spec.query_heads, layer.spec.head_dim_k) * item;
  args.q = q + static_cast<size_t>(row) * args.q_row_bytes +
           elements(head * layer.group, layer.spec.head_dim_k) * item;
  args.q_head_bytes = elements(layer.group, layer.spec.head_dim_k) * item;
  args.num_rows = num_rows;
  args.group = layer.group;
  args.first_head = head;
  args.num_heads = 1;
  args.window = layer.spec.window;
  args.scale2 = layer.scale2;
  args.cap2 = layer.cap2;
  args.scratch = scratch_[static_cast<size_t>(thread)];
  return args;
}

/// State and destination are still to be set.
WriteArgs PagedAttention::write_args(const Layer& layer, int head, int num_rows) const {
  WriteArgs args;
  args.num_rows = num_rows;
  args.group = layer.group;
  args.dv = layer.spec.head_dim_v;
  args.dv_padded = layer.layout.dv_padded;
  args.sinks = layer.spec.sinks.empty() ? nullptr : layer.spec.sinks.data() + head * layer.group;
  args.dtype = dtype_;
  args.lse = nullptr;
  args.lse_row_stride = 0;
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
  const StepSchedule::Span& span = step.span(tile.span);
  AttendArgs args =
      attend_args(layer, tile.head, span.pages, step.q, span.first_attending_row + tile.first_row,
                  tile.num_rows, thread);
  args.begin = task.begin;
  args.end = task.end;
  args.first_position = span.context_tokens + tile.first_row;
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

void PagedAttention::store(const StepSchedule& step, const Layer& layer, int span_index, int head,
                           const std::byte* k, const std::byte* v) const {
  const StepSchedule::Span& span = step.span(span_index);
  const size_t item = item_bytes(dtype_);
  const auto first = static_cast<size_t>(span.first_row);
  AppendArgs args;
  args.pages = pages_of(layer, span.pages);
  args.head = head;
  args.first_token = span.context_tokens;
  args.num_tokens = span.num_rows;
  args.dtype = dtype_;
  args.k_row_bytes = elements(layer.spec.kv_heads, layer.spec.head_dim_k) * item;
  args.v_row_bytes = elements(layer.spec.kv_heads, layer.spec.head_dim_v) * item;
  args.k = k + first * args.k_row_bytes + elements(head, layer.spec.head_dim_k) * item;
  args.v = v + first * args.v_row_bytes + elements(head, layer.spec.head_dim_v) * item;
  append_(args);
}

void PagedAttention::finish(StepSchedule& step, int layer_index, const std::byte* k,
                            const std::byte* v, std::byte* out) {
  const Layer& layer = layer_at(layer_index);
  const StepSchedule::Work& work = step.work(layer.kind);
  assert(work.tiles.empty() || step.layer == layer_index);
  run_pieces(step, work.store_pieces, [&](size_t index, int) {
    store(step, layer, work.stores[index].span, work.stores[index].head, k, v);
  });
  run_pieces(step, work.tile_pieces, [&](size_t index, int thread) {
    const StepSchedule::Tile& tile = work.tiles[index];
    for (int head = 0; head < tile.num_heads; ++head) {
      finish_head(step, layer, tile, head, k, v, out, thread);
    }
  });
  step.layer = -1;
}

void PagedAttention::finish_head(StepSchedule& step, const Layer& layer,
                                 const StepSchedule::Tile& tile, int head_of_tile,
                                 const std::byte* k, const std::byte* v, std::byte* out,
                                 int thread) {
  const StepSchedule::Span& span = step.span(tile.span);
  const int head = tile.head + head_of_tile;
  if (span.num_rows == 1) store(step, layer, tile.span, head, k, v);
  const int lines = tile.num_rows * layer.group;
  const int dv_padded = layer.layout.dv_padded;
  const int64_t row = span.first_attending_row + tile.first_row;
  AttendArgs args = attend_args(layer, head, span.pages, step.q, row, tile.num_rows, thread);
  args.begin = span.context_tokens;
  args.end = span.context_tokens + tile.first_row + tile.num_rows;
  args.first_position = span.context_tokens + tile.first_row;
  if (tile.num_partials == 0) {
    args.state = State::at(args.scratch.state, lines, dv_padded);
    clear_state(args.state, lines, dv_padded);
  } else {
    const size_t state_floats = State::num_floats(lines, dv_padded);
    float* partial =
        step.partials() + tile.partial + static_cast<size_t>(head_of_tile) * state_floats;
    args.state = State::at(partial, lines, dv_padded);
    for (int i = 1; i < tile.num_partials; ++i) {
      partial += static_cast<size_t>(tile.num_heads) * state_floats;
      kernels_.merge(args.state, State::at(partial, lines, dv_padded), lines, dv_padded);
    }
  }
  kernels_.attend(args);

  WriteArgs to = write_args(layer, head, tile.num_rows);
  const size_t item = item_bytes(dtype_);
  to.state = args.state;
  to.out_row_bytes = elements(layer.spec.query_heads, layer.spec.head_dim_v) * item;
  to.out = out + static_cast<size_t>(row) * to.out_row_bytes +
           elements(head * layer.group, layer.spec.head_dim_v) * item;
  kernels_.write(to);
}

void PagedAttention::attend_share(int layer_index, std::span<const int32_t> pages, int64_t begin,
                                  int64_t end, int64_t first_position, int num_rows,
                                  const std::byte* q, float* out, float* lse) {
  const Layer& layer = layer_at(layer_index);
  const int tile_rows = std::max(1, kTileLines / layer.group);
  const int num_tiles = (num_rows + tile_rows - 1) / tile_rows;
  const int query_heads = layer.spec.query_heads;
  pool_->run([&](int thread) {
    const Part part = equal_part(int64_t{layer.spec.kv_heads} * num_tiles, thread,
                                 pool_->num_threads());
    for (int64_t i = part.begin; i < part.end; ++i) {
      const int head = static_cast<int>(i / num_tiles);
      const int first_row = static_cast<int>(i % num_tiles) * tile_rows;
      const int rows = std::min(tile_rows, num_rows - first_row);
      AttendArgs args = attend_args(layer, head, pages.data(), q, first_row, rows, thread);
      args.begin = begin;
      args.end = end;
      args.first_position = first_position + first_row;
      args.state = State::at(args.scratch.state, rows * layer.group, layer.layout.dv_padded);
      clear_state(args.state, rows * layer.group, layer.layout.dv_padded);
      if (begin < end) kernels_.attend(args);

      WriteArgs to = write_args(layer, head, rows);
      to.state = args.state;
      to.sinks = nullptr;
      to.dtype = Dtype::float32;
      to.out_row_bytes = elements(query_heads, layer.spec.head_dim_v) * sizeof(float);
      to.out = reinterpret_cast<std::byte*>(out) + static_cast<size_t>(first_row) * to.out_row_bytes +
               elements(head * layer.group, layer.spec.head_dim_v) * sizeof(float);
      to.lse = lse + elements(first_row, query_heads) + head * layer.group;
      to.lse_row_stride = static_cast<size_t>(query_heads);
      kernels_.write(to);
    }
  });
}

}  // namespace lamina
