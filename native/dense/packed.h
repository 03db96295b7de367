// The weights of one linear, or of several that read the same input, in the kernels' layout.
#pragma once

#include <vector>

#include "core/threads.h"
#include "dense/kernels.h"
#include "core/huge.h"

namespace lamina::dense {

/// Owns packed weights and biases; the sources can be freed once they are added.
class PackedLinear {
 public:
  /// Room for N outputs of K inputs, all zero, in huge pages.
  PackedLinear(Element element, int64_t num_outputs, int64_t num_inputs);

  /// Set outputs [first, first + count): weight (o, i) lies at weights[o * output_stride + i *
  /// input_stride] (elements). Blocks for about as long as it takes to read them.
  void set(int64_t first, const void* weights, int64_t count, int64_t output_stride,
           int64_t input_stride, ThreadPool& pool);
  /// Set the bias of outputs [first, first + count); outputs without one add zero.
  void set_bias(int64_t first, const float* bias, int64_t count);

  Element element() const { return element_; }
  int64_t num_outputs() const { return num_outputs_; }
  int64_t num_inputs() const { return num_inputs_; }
  int64_t num_panels() const { return (num_outputs_ + kPanel - 1) / kPanel; }
  const void* data() const { return memory_.data(); }
  const float* bias() const { return bias_.empty() ? nullptr : bias_.data(); }
  size_t bytes() const { return memory_.bytes(); }

 private:
  Element element_;
  int64_t num_outputs_;
  int64_t num_inputs_;
  HugeBuffer memory_;
  std::vector<float> bias_;
};

}  // namespace lamina::dense
