// The attention executor of one share of the heads: cached keys and values, and the work of layers.
//
// The control plane (Python) owns the page books; a step comes as arrays of numbers, once. Per layer
// only pointers change hands: `attend_cached` as soon as q is there, `finish` when k and v are.
// Several steps (micro-batches) may be in progress at the same time, on one thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace lamina {

/// What the rows of one step do; made once per step, read by every layer.
class StepSchedule;

class AttentionExecutor {
 public:
  virtual ~AttentionExecutor() = default;

  virtual int num_layers() const = 0;

  /// Bytes of a layer's q [A, Hq, Dk] per attending row, of k [N, Hkv, Dk] and v [N, Hkv, Dv] per row,
  /// and of the output [A, Hq, Dv] per attending row; elements are of the model's dtype.
  virtual size_t q_row_bytes(int layer) const = 0;
  virtual size_t k_row_bytes(int layer) const = 0;
  virtual size_t v_row_bytes(int layer) const = 0;
  virtual size_t out_row_bytes(int layer) const = 0;

  /// Attend over the tokens committed before the step; keeps float32 partial results in `step`.
  /// q: [A, Hq, Dk]; must stay unchanged until `finish` of this layer returns.
  virtual void attend_cached(StepSchedule& step, int layer, const std::byte* q) = 0;

  /// Append k and v, attend to them, merge with the cached part and the sinks, write out [A, Hq, Dv].
  /// k, v: [N, Hkv, Dk] and [N, Hkv, Dv]. out may be null if no row attends.
  virtual void finish(StepSchedule& step, int layer, const std::byte* k, const std::byte* v,
                      std::byte* out) = 0;
};

/// Rows of a step.
int64_t num_rows(const StepSchedule& step);
int64_t num_attending_rows(const StepSchedule& step);

}  // namespace lamina
