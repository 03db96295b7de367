#include "attention/schedule.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <utility>

namespace lamina {
namespace {

/// Pieces per thread: enough that a thread which was held up does not hold up the others.
constexpr int kPiecesPerThread = 4;

/// Work below this, in tokens of one line, is not worth a second thread.
constexpr int64_t kLeastPieceCost = 4096;

/// Parts of a sequence shorter than this are not worth a partial result of their own.
constexpr int64_t kLeastTaskTokens = 2 * kBlockTokens;

/// Cost of a token for a tile: reading it, and computing with it.
int64_t token_cost(int lines) { return 4 + lines; }

/// Cuts a sequence of costs into pieces.
class Pieces {
 public:
  Pieces(int64_t total, int num_threads) {
    const int64_t wanted = num_threads == 1 ? 1 : num_threads * kPiecesPerThread;
    const int64_t count = std::clamp<int64_t>(total / kLeastPieceCost, 1, wanted);
    size_ = (total + count - 1) / count;
  }

  int64_t left() const { return size_ - used_; }

  /// `end`: items so far.
  void add(int64_t cost, int end, std::vector<int>& ends) {
    used_ += cost;
    if (used_ >= size_) close(end, ends);
  }
  void close(int end, std::vector<int>& ends) {
    if (end > (ends.empty() ? 0 : ends.back())) ends.push_back(end);
    used_ = 0;
  }

 private:
  int64_t size_;
  int64_t used_ = 0;
};

/// What finishing a tile costs: its new tokens, and as much again for storing and writing.
int64_t finish_cost(const StepSchedule::Tile& tile, int group) {
  const int lines = tile.num_rows * group;
  const int64_t seen = tile.first_row + tile.num_rows;
  return tile.num_heads *
         (token_cost(lines) * std::max<int64_t>(seen, kLanes) + 4 * int64_t{kLanes} * lines);
}

}  // namespace

void BufferPool::Free::operator()(float* memory) const { std::free(memory); }

BufferPool::Buffer BufferPool::take(size_t num_floats) {
  {
    const std::lock_guard lock(mutex_);
    for (Buffer& buffer : spare_) {
      if (buffer.num_floats < num_floats) continue;
      Buffer found = std::move(buffer);
      buffer = std::move(spare_.back());
      spare_.pop_back();
      return found;
    }
    spare_.clear();
  }
  const size_t num_bytes = static_cast<size_t>(
      round_up(static_cast<int64_t>(std::max<size_t>(num_floats, 1) * sizeof(float)), 4096));
  void* memory = std::aligned_alloc(64, num_bytes);
  if (memory == nullptr) throw std::bad_alloc();
  Buffer buffer;
  buffer.memory.reset(static_cast<float*>(memory));
  buffer.num_floats = num_bytes / sizeof(float);
  return buffer;
}

void BufferPool::give_back(Buffer buffer) {
  const std::lock_guard lock(mutex_);
  spare_.push_back(std::move(buffer));
}

StepSchedule::StepSchedule(const StepSpans& spans, std::span<const LayerKind> kinds,
                           int num_threads, std::shared_ptr<BufferPool> buffers)
    : pages_(spans.pages.begin(), spans.pages.end()), buffers_(std::move(buffers)) {
  const int32_t* pages = pages_.data();
  for (size_t i = 0; i < spans.num_rows.size(); ++i) {
    const bool attends = spans.attends[i] != 0;
    spans_.push_back({spans.num_rows[i], spans.context_tokens[i], attends, num_rows_,
                      num_attending_rows_, pages});
    pages += spans.num_pages[i];
    num_rows_ += spans.num_rows[i];
    if (attends) num_attending_rows_ += spans.num_rows[i];
  }
  size_t num_floats = 0;
  for (const LayerKind& kind : kinds) {
    num_floats = std::max(num_floats, plan_kind(kind, num_threads, work_.emplace_back()));
  }
  partials_ = buffers_->take(num_floats);
}

StepSchedule::~StepSchedule() { buffers_->give_back(std::move(partials_)); }

size_t StepSchedule::plan_kind(const LayerKind& kind, int num_threads, Work& work) const {
  const int tile_rows = std::max(1, kTileLines / kind.group);
  int64_t store_cost = 0, tile_cost = 0, task_cost = 0;
  const auto cached_begin = [&](const Span& span, const Tile& tile) {
    return std::max<int64_t>(0, span.context_tokens + tile.first_row - kind.window + 1);
  };
  for (int s = 0; s < static_cast<int>(spans_.size()); ++s) {
    const Span& span = spans_[static_cast<size_t>(s)];
    if (span.num_rows == 0) continue;
    const int heads_together = span.num_rows == 1 ? kind.kv_heads : 1;
    for (int head = 0; head < kind.kv_heads; ++head) {
      // A single row that attends is stored by whoever finishes it.
      if (!span.attends || span.num_rows > 1) {
        work.stores.push_back({s, head});
        store_cost += int64_t{kLanes} * span.num_rows;
      }
      if (!span.attends || head % heads_together != 0) continue;
      for (int row = 0; row < span.num_rows; row += tile_rows) {
        const Tile tile{s,   head, heads_together, row, std::min(tile_rows, span.num_rows - row),
                        0,   0};
        work.tiles.push_back(tile);
        tile_cost += finish_cost(tile, kind.group);
        const int64_t tokens = std::max<int64_t>(0, span.context_tokens - cached_begin(span, tile));
        task_cost += tokens * heads_together * token_cost(tile.num_rows * kind.group);
      }
    }
  }

  Pieces store_pieces(store_cost, num_threads);
  for (size_t i = 0; i < work.stores.size(); ++i) {
    const Span& span = spans_[static_cast<size_t>(work.stores[i].span)];
    store_pieces.add(int64_t{kLanes} * span.num_rows, static_cast<int>(i) + 1, work.store_pieces);
  }
  store_pieces.close(static_cast<int>(work.stores.size()), work.store_pieces);

  Pieces tile_pieces(tile_cost, num_threads);
  Pieces task_pieces(task_cost, num_threads);
  size_t used = 0;
  for (size_t i = 0; i < work.tiles.size(); ++i) {
    Tile& tile = work.tiles[i];
    const Span& span = spans_[static_cast<size_t>(tile.span)];
    const int lines = tile.num_rows * kind.group;
    const size_t num_floats = static_cast<size_t>(tile.num_heads) *
                              State::num_floats(lines, kind.dv_padded);
    const int64_t cost_per_token = tile.num_heads * token_cost(lines);
    tile.partial = used;
    int64_t begin = cached_begin(span, tile);
    while (begin < span.context_tokens) {
      int64_t end = span.context_tokens;
      const int64_t room = task_pieces.left() / cost_per_token;
      const int64_t cut = (begin + room) / kBlockTokens * kBlockTokens;
      if (cut - begin >= kLeastTaskTokens && end - cut >= kLeastTaskTokens) end = cut;
      work.tasks.push_back({static_cast<int>(i), begin, end, used});
      const int64_t cost = (end - begin) * cost_per_token;
      // What is left is too little for a part of its own: close the piece all the same.
      const bool is_full = end < span.context_tokens;
      task_pieces.add(cost, static_cast<int>(work.tasks.size()), work.task_pieces);
      if (is_full) task_pieces.close(static_cast<int>(work.tasks.size()), work.task_pieces);
      used += num_floats;
      ++tile.num_partials;
      begin = end;
    }
    tile_pieces.add(finish_cost(tile, kind.group), static_cast<int>(i) + 1, work.tile_pieces);
  }
  task_pieces.close(static_cast<int>(work.tasks.size()), work.task_pieces);
  tile_pieces.close(static_cast<int>(work.tiles.size()), work.tile_pieces);
  return used;
}

int64_t num_rows(const StepSchedule& step) { return step.num_rows(); }
int64_t num_attending_rows(const StepSchedule& step) { return step.num_attending_rows(); }

}  // namespace lamina
