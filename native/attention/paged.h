// The attention executor over paged memory of this machine.
#pragma once

#include <memory>
#include <vector>

#include "attention/executor.h"
#include "attention/kernels.h"
#include "attention/schedule.h"
#include "core/memory.h"
#include "core/threads.h"

namespace lamina {

/// One layer's attention, of the heads of one lane; `AttentionSpec` in Python.
struct LayerSpec {
  int query_heads, kv_heads, head_dim_k, head_dim_v;
  float scale;
  int64_t window;            // kNoWindow: none
  float softcap;             // 0: none
  std::vector<float> sinks;  // per query head of all lanes' groups of heads; empty: none
};

/// Bytes of one page of a lane over all layers.
size_t page_bytes(std::span<const LayerSpec> layers, CacheType type, int page_tokens);

class PagedAttention final : public AttentionExecutor {
 public:
  /// Throws MemoryShortage, and std::invalid_argument for head sizes above 256.
  PagedAttention(std::vector<LayerSpec> layers, Dtype dtype, CacheType type, int64_t num_pages,
                 int page_tokens, std::shared_ptr<ThreadPool> pool, Isa isa);

  /// Decide the work of a step. The pages must hold context + stored tokens of each lane, and must
  /// not be given to others before the step is over or the lane is revoked.
  std::shared_ptr<StepSchedule> begin(const StepLanes& lanes);

  int num_layers() const override { return static_cast<int>(layers_.size()); }
  size_t q_bytes(const StepSchedule& step, int layer) const override;
  size_t k_bytes(const StepSchedule& step, int layer) const override;
  size_t v_bytes(const StepSchedule& step, int layer) const override;
  size_t out_bytes(const StepSchedule& step, int layer) const override;
  void attend_cached(StepSchedule& step, int layer, const std::byte* q) override;
  void finish(StepSchedule& step, int layer, const std::byte* k, const std::byte* v,
              std::byte* out) override;

 private:
  struct Layer {
    LayerSpec spec;
    PageLayout layout;
    int group;
    float scale2, cap2;
    size_t offset;  // within a page
    size_t kind;
  };

  const Layer& layer_at(int layer) const { return layers_[static_cast<size_t>(layer)]; }
  LayerPages pages_of(const Layer& layer, const int32_t* pages) const;
  AttendArgs attend_args(const StepSchedule& step, const Layer& layer,
                         const StepSchedule::Tile& tile, int head, int thread) const;
  void run_task(StepSchedule& step, const Layer& layer, size_t index, int thread);
  void store(const StepSchedule& step, const Layer& layer, int lane, int head, const std::byte* k,
             const std::byte* v) const;
  void attend_stored(StepSchedule& step, const Layer& layer, const StepSchedule::Tile& tile,
                     int head, const State& state, int thread) const;
  void write(const StepSchedule& step, const Layer& layer, const StepSchedule::Tile& tile, int head,
             const State& state, std::byte* out) const;
  void finish_head(StepSchedule& step, const Layer& layer, const StepSchedule::Tile& tile,
                   int head_of_tile, const std::byte* k, const std::byte* v, std::byte* out,
                   int thread);
  template <typename Item>
  void run_pieces(StepSchedule& step, const std::vector<int>& pieces, Item&& item);

  std::vector<Layer> layers_;
  std::vector<LayerKind> kinds_;
  Dtype dtype_;
  CacheType type_;
  size_t page_stride_;
  std::shared_ptr<ThreadPool> pool_;
  HugeMemory memory_;
  Kernels kernels_;
  Append append_;
  std::vector<std::unique_ptr<std::byte[]>> scratch_memory_;
  std::vector<Scratch> scratch_;
  std::shared_ptr<BufferPool> buffers_ = std::make_shared<BufferPool>();
};

}  // namespace lamina
