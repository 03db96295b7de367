// The attention executor: cached keys and values of its lanes, and the work of layers.
//
// A *lane* is some KV heads of one sequence with pages of their own (kv/pages.py); all lanes of an
// executor have equally many heads. The control plane (Python) owns the page books; a step comes as
// arrays of numbers, once. Per layer only pointers change hands: `attend_cached` as soon as q is
// there, `finish` when k and v are. Several steps (micro-batches) may be in progress at the same
// time, on one thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace lamina {

/// What the lanes of one step do; made once per step, read by every layer.
class StepSchedule;

/// Shapes: A attending and N stored rows of all lanes, lane by lane; Hq and Hkv heads of one lane, Dk
/// and Dv sizes of k and v vectors. Elements are of the model's dtype.
class AttentionExecutor {
 public:
  virtual ~AttentionExecutor() = default;

  virtual int num_layers() const = 0;

  /// Bytes of a layer's q [A, Hq, Dk], k [N, Hkv, Dk], v [N, Hkv, Dv] and output.
  virtual size_t q_bytes(const StepSchedule& step, int layer) const = 0;
  virtual size_t k_bytes(const StepSchedule& step, int layer) const = 0;
  virtual size_t v_bytes(const StepSchedule& step, int layer) const = 0;
  virtual size_t out_bytes(const StepSchedule& step, int layer) const = 0;

  /// Attend over the tokens committed before the step; keeps float32 partial results in `step`.
  /// q must stay unchanged until `finish` of this layer returns.
  virtual void attend_cached(StepSchedule& step, int layer, const std::byte* q) = 0;

  /// Append k and v, attend to them, merge with the cached part and, where rows are stored, the
  /// sinks; write out [A, Hq, Dv]. If the step is partial, out is float32 and the LSE [A, Hq] (natural
  /// logarithm) follows it, float32; zeros and -inf where nothing was seen.
  /// k and v may be null if no row is stored, out if none attends.
  virtual void finish(StepSchedule& step, int layer, const std::byte* k, const std::byte* v,
                      std::byte* out) = 0;
};

/// Rows of all lanes of a step.
int64_t num_stored_rows(const StepSchedule& step);
int64_t num_attending_rows(const StepSchedule& step);

/// Whether a layer must wait for an earlier step that is still to store tokens in the same lanes.
bool must_wait(StepSchedule& step, int layer);

/// No layer of the step will be served any more.
void end_step(StepSchedule& step);

}  // namespace lamina
