// What the lanes of a step do, decided once per step and followed by every layer.
//
// The rows of a lane are cut into tiles. A single row is one tile with all its KV heads, which are
// read in the order in which they lie in memory; the tiles of a prompt chunk have one head each, which
// stays in the caches for many rows. A tile's cached tokens are one or, where that
// balances the threads, several tasks, whose partial results lie one after the other. Tasks are
// grouped into pieces of about equal cost that the threads take in turn.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "attention/executor.h"
#include "attention/kernels.h"

namespace lamina {

/// What layers must share to follow the same decisions.
struct LayerKind {
  int64_t window;
  int kv_heads, group, dv_padded;

  bool operator==(const LayerKind&) const = default;
};

/// The step as the control plane gives it. Arrays of one entry per lane, but for `pages`: the pages
/// of all lanes, in token order, `num_pages` of each. Tokens and positions count from the lane's
/// first token.
struct StepLanes {
  std::span<const int32_t> num_attending;   // rows; 0, or as many as are stored, or none is stored
  std::span<const int32_t> num_stored;      // rows
  std::span<const int64_t> context_tokens;  // committed
  std::span<const int64_t> first_position;  // of the first row that attends; context_tokens or more
  std::span<const int32_t> heads;           // which group of the model's heads the lane has
  std::span<const int32_t> num_pages;
  std::span<const int32_t> pages;
  bool is_partial;  // outputs are float32 and come with their LSE
};

/// Buffers of floats, aligned to 64 bytes, that steps hand on to later steps.
class BufferPool {
 public:
  struct Free {
    void operator()(float* memory) const;
  };
  struct Buffer {
    std::unique_ptr<float, Free> memory;
    size_t num_floats = 0;
  };

  Buffer take(size_t num_floats);
  void give_back(Buffer buffer);

 private:
  std::mutex mutex_;
  std::vector<Buffer> spare_;
};

/// Most lines of a tile, unless one row has more.
constexpr int kTileLines = 64;

class StepSchedule {
 public:
  struct Lane {
    int num_attending, num_stored;
    int64_t context_tokens, first_position;
    int heads;
    bool is_revoked;              // its pages may be others': nothing is written to them
    int64_t first_stored_row;     // among all rows of the step that are stored
    int64_t first_attending_row;  // among those that attend
    const int32_t* pages;

    /// A single row that attends is stored by whoever finishes it, other rows before that.
    bool is_stored_late() const { return num_attending == 1 && num_stored == 1; }
  };
  struct Tile {
    int lane;
    int head, num_heads;
    int first_row, num_rows;  // within the lane's rows that attend
    size_t partial;           // offset of the first partial result (of all heads), in floats
    int num_partials;
  };
  struct Task {
    int tile;
    int64_t begin, end;  // cached tokens
    size_t partial;
  };
  struct Store {
    int lane, head;
  };
  /// Pieces are given by their ends; piece i starts where piece i - 1 ends.
  struct Work {
    std::vector<Tile> tiles;
    std::vector<Task> tasks;
    std::vector<int> task_pieces;
    std::vector<int> tile_pieces;
    std::vector<Store> stores;  // what is appended before any tile is finished
    std::vector<int> store_pieces;
  };

  StepSchedule(const StepLanes& lanes, std::span<const LayerKind> kinds, int num_threads,
               std::shared_ptr<BufferPool> buffers);
  ~StepSchedule();
  StepSchedule(const StepSchedule&) = delete;
  StepSchedule& operator=(const StepSchedule&) = delete;

  const Lane& lane(int index) const { return lanes_[static_cast<size_t>(index)]; }
  const Work& work(size_t kind) const { return work_[kind]; }
  float* partials() { return partials_.memory.get(); }
  int64_t num_stored_rows() const { return num_stored_rows_; }
  int64_t num_attending_rows() const { return num_attending_rows_; }
  bool is_partial() const { return is_partial_; }

  /// The pages of a lane were truncated or released by a later step: leave them alone.
  void revoke(size_t lane) { lanes_.at(lane).is_revoked = true; }

  /// The next piece that no thread has taken; counts from 0 after `restart_pieces`.
  int take_piece() { return next_piece_.fetch_add(1, std::memory_order_relaxed); }
  void restart_pieces() { next_piece_.store(0, std::memory_order_relaxed); }

  /// Attend to what `step` stores: no layer of this step before it.
  void follow(std::shared_ptr<StepSchedule> step) { earlier_.push_back(std::move(step)); }

  /// Whether a step that this one follows has not got as far as `layer`.
  bool must_wait(int layer);

  /// Of the layer in progress: between `attend_cached` and `finish`.
  const std::byte* q = nullptr;
  int layer = -1;

  int num_layers_done = 0;

  /// No layer will be served any more.
  bool is_over = false;

 private:
  size_t plan_kind(const LayerKind& kind, int num_threads, Work& work) const;

  std::vector<int32_t> pages_;
  std::vector<Lane> lanes_;
  std::vector<std::shared_ptr<StepSchedule>> earlier_;
  std::vector<Work> work_;
  int64_t num_stored_rows_ = 0, num_attending_rows_ = 0;
  bool is_partial_;
  std::shared_ptr<BufferPool> buffers_;
  BufferPool::Buffer partials_;
  alignas(64) std::atomic<int> next_piece_{0};
};

}  // namespace lamina
