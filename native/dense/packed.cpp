#include "dense/packed.h"

#include <algorithm>
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

/// Words of `group` inputs of up to 16 outputs at a time: sequential writes, 16 streams of reads.
template <typename Word, int kGroup>
void pack(Word* packed, const Word* weights, int64_t first, int64_t begin, int64_t end,
          int64_t num_inputs, int64_t output_stride, int64_t input_stride) {
  const int64_t steps = (num_inputs + kGroup - 1) / kGroup;
  while (begin < end) {
    const int64_t panel = begin / kPanel;
    const int64_t panel_end = std::min(end, (panel + 1) * kPanel);
    Word* target = packed + (panel * steps * kPanel + begin % kPanel) * kGroup;
    for (int64_t step = 0; step < steps; ++step, target += kPanel * kGroup) {
      const int64_t count = std::min<int64_t>(kGroup, num_inputs - step * kGroup);
      const Word* source = weights + (begin - first) * output_stride + step * kGroup * input_stride;
      for (int64_t output = 0; output < panel_end - begin; ++output, source += output_stride) {
        for (int64_t i = 0; i < count; ++i) target[output * kGroup + i] = source[i * input_stride];
      }
    }
    begin = panel_end;
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
  pool.run([&](int thread) {
    const Part part = equal_part(count, thread, pool.num_threads());
    const int64_t begin = first + part.begin, end = first + part.end;
    if (element_ == Element::bf16) {
      pack<uint16_t, 2>(static_cast<uint16_t*>(memory_.data()),
                        static_cast<const uint16_t*>(weights), first, begin, end, num_inputs_,
                        output_stride, input_stride);
    } else {
      pack<float, 1>(static_cast<float*>(memory_.data()), static_cast<const float*>(weights), first,
                     begin, end, num_inputs_, output_stride, input_stride);
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
