#include "dense/packed.h"

#include <stdexcept>

namespace lamina::dense {
namespace {

/// Inputs that a panel interleaves per output.
int64_t inputs_per_step(Element element) { return element == Element::bf16 ? 2 : 1; }

size_t packed_bytes(Element element, int64_t num_outputs, int64_t num_inputs) {
  const int64_t group = inputs_per_step(element);
  const int64_t panels = (num_outputs + kPanel - 1) / kPanel;
  const int64_t inputs = (num_inputs + group - 1) / group * group;
  return static_cast<size_t>(panels * kPanel * inputs) * element_bytes(element);
}

template <typename Word>
void pack(Word* packed, const Word* weights, int64_t first, int64_t begin, int64_t end,
          int64_t num_inputs, int64_t output_stride, int64_t input_stride, int64_t group) {
  const int64_t inputs = (num_inputs + group - 1) / group * group;
  for (int64_t output = begin; output < end; ++output) {
    Word* panel = packed + output / kPanel * kPanel * inputs + output % kPanel * group;
    const Word* source = weights + (output - first) * output_stride;
    for (int64_t input = 0; input < num_inputs; ++input) {
      panel[input / group * kPanel * group + input % group] = source[input * input_stride];
    }
  }
}

}  // namespace

PackedLinear::PackedLinear(Element element, int64_t num_outputs, int64_t num_inputs)
    : element_(element),
      num_outputs_(num_outputs),
      num_inputs_(num_inputs),
      memory_(packed_bytes(element, num_outputs, num_inputs)) {
  if (num_outputs < 1 || num_inputs < 1) {
    throw std::invalid_argument("a linear has at least one input and one output");
  }
}

void PackedLinear::set(int64_t first, const void* weights, int64_t count, int64_t output_stride,
                       int64_t input_stride, ThreadPool& pool) {
  if (first < 0 || count < 0 || first + count > num_outputs_) {
    throw std::invalid_argument("these outputs are not of this linear");
  }
  const int64_t group = inputs_per_step(element_);
  pool.run([&](int thread) {
    const Part part = equal_part(count, thread, pool.num_threads());
    const int64_t begin = first + part.begin, end = first + part.end;
    if (element_ == Element::bf16) {
      pack(static_cast<uint16_t*>(memory_.data()), static_cast<const uint16_t*>(weights), first,
           begin, end, num_inputs_, output_stride, input_stride, group);
    } else {
      pack(static_cast<float*>(memory_.data()), static_cast<const float*>(weights), first, begin,
           end, num_inputs_, output_stride, input_stride, group);
    }
  });
}

void PackedLinear::set_bias(int64_t first, const float* bias, int64_t count) {
  if (first < 0 || count < 0 || first + count > num_outputs_) {
    throw std::invalid_argument("these outputs are not of this linear");
  }
  bias_.resize(num_outputs_);
  std::copy(bias, bias + count, bias_.begin() + first);
}

}  // namespace lamina::dense
