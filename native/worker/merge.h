// Merging the outputs of executors that attend to different tokens of the same rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention/layout.h"
#include "worker/executor_end.h"

namespace lamina {

/// Collects a layer's partial outputs into the layer's output. Every share of the tokens comes
/// normalised, with the log-sum-exp of its scores, which says how much it weighs.
///
/// Holds float32 sums of one layer at a time; one thread.
class ShareMerger {
 public:
  /// `num_units`: of every row. `dtype`: of the layer's output.
  ShareMerger(std::vector<LayerUnit> layers, int64_t num_units, Dtype dtype,
              int num_micro_batches);

  /// The micro-batch's next step: `num_rows` rows, and all ends whose outputs are partial, each of
  /// which has begun the step. They must outlive the step.
  void begin(int micro_batch, int64_t num_rows, std::vector<ExecutorEnd*> ends);

  /// Wait for the outputs, end by end, and write what they merge to into its rows and heads of
  /// out [T, Hq, Dv]. Zeros where nothing took part. May be called again after a deadline.
  void collect(int micro_batch, int layer, uint64_t number, std::byte* out, double deadline);

 private:
  struct Step {
    std::vector<ExecutorEnd*> ends;
    std::vector<Piece> touched;  // all that any end's outputs cover, each cell once
    int64_t num_rows = 0;
    size_t num_collected = 0;  // of the present layer
  };

  void add(const Pieces& pieces, const LayerUnit& unit, const PartialOutput& part);
  void write(const Step& step, const LayerUnit& unit, std::byte* out) const;

  std::vector<LayerUnit> layers_;
  int64_t num_units_;
  Dtype dtype_;
  std::vector<Step> steps_;
  std::vector<float> sums_;    // [T, Hq, Dv], weighted by exp(lse - peak)
  std::vector<float> peaks_;   // [T, Hq], largest LSE so far
  std::vector<float> totals_;  // [T, Hq], sum of the weights
};

}  // namespace lamina
