// The row-wise operations of a model's slices, one table of functions per instruction set.
//
// T rows, H heads of D elements, K inputs and N outputs of a linear. Elements are bfloat16 or
// float; all arithmetic is float32, rounded to the element type where eager torch rounds.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/isa.h"

namespace lamina::dense {

enum class Element : int { bf16 = 0, f32 = 1 };

inline constexpr int kPanel = 16;
/// Outputs per panel of packed weights; a panel holds [K / 2][16][2] bfloat16 or [K][16] float.

inline size_t element_bytes(Element element) { return element == Element::bf16 ? 2 : 4; }

/// Memory of T rows of H heads of D elements; element d of head h of row t lies at
/// data[t * row_stride + h * head_stride + d]. Strides are in elements.
struct Rows {
  void* data = nullptr;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
  int64_t heads = 0;
  int64_t width = 0;

  template <typename E>
  E* at(int64_t row, int64_t head = 0) const {
    return static_cast<E*>(data) + row * row_stride + head * head_stride;
  }
};

/// out[t] = x[t] @ W^T + bias, then + residual[t] if there is one.
struct LinearJob {
  Rows x;                 // one head of K
  const void* packed;     // panels, see kPanel; inputs padded to an even number with zeros
  int64_t num_inputs;     // K
  int64_t num_outputs;    // N
  const float* bias;      // [N] or null
  Rows out;               // one head of N
  Rows residual;          // one head of N, or null data
};

enum class NormKind : int {
  rms = 0,         // round(x / rms) * weight
  rms_once = 1,    // x / rms * weight, rounded once
  layer = 2,       // (x - mean) / std * weight + bias
};

struct NormJob {
  Rows x;
  const float* weight;  // [D] or null
  const float* bias;    // [D] or null; only for `layer`
  Rows out;
  float eps;
  NormKind kind;
};

enum class Activation : int { silu = 0, gelu_tanh = 1, gelu = 2, relu = 3 };

/// out = activation(x) * gate, or without the factor where `gate` has no data.
struct ActivationJob {
  Rows x;
  Rows gate;
  Rows out;
  Activation activation;
};

/// Rotates the first R = cos.width elements of each head, halves against each other, and copies
/// the rest. cos and sin have one head per row.
struct RotaryJob {
  Rows x;
  Rows cos;
  Rows sin;
  Rows out;
};

/// out = x + other, or a copy of x where `other` has no data.
struct AddJob {
  Rows x;
  Rows other;
  Rows out;
};

/// Functions of one instruction set for one element type. Ranges are [begin, end).
struct Kernels {
  /// Rows and panels of a linear. `scratch`: linear_scratch_bytes(K) of this thread's memory.
  void (*linear)(const LinearJob&, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                 int64_t panel_end, void* scratch);
  size_t (*linear_scratch_bytes)(int64_t num_inputs);
  /// Items are (row, head) pairs, row by row.
  void (*norm)(const NormJob&, int64_t item_begin, int64_t item_end);
  void (*activation)(const ActivationJob&, int64_t item_begin, int64_t item_end);
  void (*rotary)(const RotaryJob&, int64_t item_begin, int64_t item_end);
  void (*add)(const AddJob&, int64_t item_begin, int64_t item_end);
  /// The index of the largest of `width` < 2^31 elements and its value: the first of equals, or the
  /// first NaN if there is one.
  int64_t (*argmax)(const void* row, int64_t width, float* value);
};

/// The best kernels that run at this level.
const Kernels& kernels(Isa isa, Element element);

}  // namespace lamina::dense
