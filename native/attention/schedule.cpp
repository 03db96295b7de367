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
int64_t finish_cost(const StepSchedule::Lane& lane, const StepSchedule::Tile& tile, int group) {
  const int lines = tile.num_rows * group;
  const int64_t writing = 4 * int64_t{kLanes} * lines;
  if (lane.num_stored == 0) return tile.num_heads * writing;
  const int64_t seen = tile.first_row + tile.num_rows;
  return tile.num_heads * (token_cost(lines) * std::max<int64_t>(seen, kLanes) + writing);
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

StepSchedule::StepSchedule(const StepLanes& lanes, std::span<const LayerKind> kinds,
                           int num_threads, std::shared_ptr<BufferPool> buffers)
    : pages_(lanes.pages.begin(), lanes.pages.end()),
      is_partial_(lanes.is_partial),
      buffers_(std::move(buffers)) {
  const int32_t* pages = pages_.data();
  lanes_.reserve(lanes.num_pages.size());
  for (size_t i = 0; i < lanes.num_pages.size(); ++i) {
    lanes_.push_back({lanes.num_attending[i], lanes.num_stored[i], lanes.context_tokens[i],
                      lanes.first_position[i], lanes.heads[i], false, num_stored_rows_,
                      num_attending_rows_, pages});
    pages += lanes.num_pages[i];
    num_stored_rows_ += lanes.num_stored[i];
    num_attending_rows_ += lanes.num_attending[i];
  }
  size_t num_floats = 0;
  for (const LayerKind& kind : kinds) {
    num_floats = std::max(num_floats, plan_kind(kind, num_threads, work_.emplace_back()));
  }
  partials_ = buffers_->take(num_floats);
}

StepSchedule::~StepSchedule() { buffers_->give_back(std::move(partials_)); }

bool StepSchedule::must_wait(int layer) {
  std::erase_if(earlier_, [](const auto& step) { return step->is_over; });
  return std::any_of(earlier_.begin(), earlier_.end(),
                     [&](const auto& step) { return step->num_layers_done <= layer; });
}

size_t StepSchedule::plan_kind(const LayerKind& kind, int num_threads, Work& work) const {
  const int tile_rows = std::max(1, kTileLines / kind.group);
  int64_t store_cost = 0, tile_cost = 0, task_cost = 0;
  const auto cached_begin = [&](const Lane& lane, const Tile& tile) {
    return std::max<int64_t>(0, lane.first_position + tile.first_row - kind.window + 1);
  };
  for (int l = 0; l < static_cast<int>(lanes_.size()); ++l) {
    const Lane& lane = lanes_[static_cast<size_t>(l)];
    const int heads_together = lane.num_attending == 1 ? kind.kv_heads : 1;
    for (int head = 0; head < kind.kv_heads; ++head) {
      if (lane.num_stored != 0 && !lane.is_stored_late()) {
        work.stores.push_back({l, head});
        store_cost += int64_t{kLanes} * lane.num_stored;
      }
      if (head % heads_together != 0) continue;
      for (int row = 0; row < lane.num_attending; row += tile_rows) {
        const Tile tile{l,   head, heads_together, row, std::min(tile_rows, lane.num_attending - row),
                        0,   0};
        work.tiles.push_back(tile);
        tile_cost += finish_cost(lane, tile, kind.group);
        const int64_t tokens = std::max<int64_t>(0, lane.context_tokens - cached_begin(lane, tile));
        task_cost += tokens * heads_together * token_cost(tile.num_rows * kind.group);
      }
    }
  }

  Pieces store_pieces(store_cost, num_threads);
  for (size_t i = 0; i < work.stores.size(); ++i) {
    const Lane& lane = lanes_[static_cast<size_t>(work.stores[i].lane)];
    store_pieces.add(int64_t{kLanes} * lane.num_stored, static_cast<int>(i) + 1,
                     work.store_pieces);
  }
  store_pieces.close(static_cast<int>(work.stores.size()), work.store_pieces);

  Pieces tile_pieces(tile_cost, num_threads);
  Pieces task_pieces(task_cost, num_threads);
  size_t used = 0;
  for (size_t i = 0; i < work.tiles.size(); ++i) {
    Tile& tile = work.tiles[i];
    const Lane& lane = lanes_[static_cast<size_t>(tile.lane)];
    const int lines = tile.num_rows * kind.group;
    const size_t num_floats = static_cast<size_t>(tile.num_heads) *
                              State::num_floats(lines, kind.dv_padded);
    const int64_t cost_per_token = tile.num_heads * token_cost(lines);
    tile.partial = used;
    int64_t begin = cached_begin(lane, tile);
    while (begin < lane.context_tokens) {
      int64_t end = lane.context_tokens;
      const int64_t room = task_pieces.left() / cost_per_token;
      const int64_t cut = (begin + room) / kBlockTokens * kBlockTokens;
      if (cut - begin >= kLeastTaskTokens && end - cut >= kLeastTaskTokens) end = cut;
      work.tasks.push_back({static_cast<int>(i), begin, end, used});
      const int64_t cost = (end - begin) * cost_per_token;
      // What is left is too little for a part of its own: close the piece all the same.
      const bool is_full = end < lane.context_tokens;
      task_pieces.add(cost, static_cast<int>(work.tasks.size()), work.task_pieces);
      if (is_full) task_pieces.close(static_cast<int>(work.tasks.size()), work.task_pieces);
      used += num_floats;
      ++tile.num_partials;
      begin = end;
    }
    tile_pieces.add(finish_cost(lane, tile, kind.group), static_cast<int>(i) + 1,
                    work.tile_pieces);
  }
  task_pieces.close(static_cast<int>(work.tasks.size()), work.task_pieces);
  tile_pieces.close(static_cast<int>(work.tiles.size()), work.tile_pieces);
  return used;
}

int64_t num_stored_rows(const StepSchedule& step) { return step.num_stored_rows(); }
int64_t num_attending_rows(const StepSchedule& step) { return step.num_attending_rows(); }
bool must_wait(StepSchedule& step, int layer) { return step.must_wait(layer); }
void end_step(StepSchedule& step) { step.is_over = true; }

}  // namespace lamina
