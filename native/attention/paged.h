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

/// One layer's attention, of the executor's own heads; `AttentionSpec` in Python.
struct LayerSpec {
  int query_heads, kv_heads, head_dim_k, head_dim_v;
  float scale;
  int64_t window;            // kNoWindow: none
  float softcap;             // 0: none
  std::vector<float> sinks;  // per query head; empty: none
};

/// Bytes of one page over all layers.
size_t page_bytes(std::span<const LayerSpec> layers, CacheType type, int page_tokens);

class PagedAttention final : public AttentionExecutor {
 public:
  /// Throws MemoryShortage, and std::invalid_argument for head sizes above 256.
  PagedAttention(std::vector<LayerSpec> layers, Dtype dtype, CacheType type, int64_t num_pages,
                 int page_tokens, std::shared_ptr<ThreadPool> pool, Isa isa);

  /// Decide the work of a step. The pages must hold context + new tokens of each span, and must not
  /// be given to others before the step is over.
  std::shared_ptr<StepSchedule> begin(const StepSpans& spans);

  int num_layers() const override { return static_cast<int>(layers_.size()); }
  size_t q_row_bytes(int layer) const override;
  size_t k_row_bytes(int layer) const override;
  size_t v_row_bytes(int layer) const override;
  size_t out_row_bytes(int layer) const override;
  void attend_cached(StepSchedule& step, int layer, const std::byte* q) override;
  void finish(StepSchedule& step, int layer, const std::byte* k, const std::byte* v,
              std::byte* out) override;

  /// Attend over stored tokens [begin, end) of one sequence only, without sinks. Rows are at
  /// `first_position`, `first_position` + 1, ... Writes out [R, Hq, Dv] and lse [R, Hq], float32.
  void attend_share(int layer, std::span<const int32_t> pages, int64_t begin, int64_t end,
                    int64_t first_position, int num_rows, const std::byte* q, float* out,
                    float* lse);

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
  AttendArgs attend_args(const Layer& layer, int head, const int32_t* pages, const std::byte* q,
                         int64_t row, int num_rows, int thread) const;
  WriteArgs write_args(const Layer& layer, int head, int num_rows) const;
  void run_task(StepSchedule& step, const Layer& layer, size_t index, int thread);
  void store(const StepSchedule& step, const Layer& layer, int span, int head, const std::byte* k,
             const std::byte* v) const;
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
