#include "attention/kernels.h"

#include <cstring>
#include <limits>

#include "attention/kernel_tables.h"

namespace lamina {
namespace {

constexpr int kMaxHeadDim = 256;

const KernelTable& table_for(Isa isa) {
#if LAMINA_X86
  if (isa >= Isa::avx512) return kAvx512Kernels;
  if (isa == Isa::avx2) return kAvx2Kernels;
#endif
  return kPortableKernels;
}

struct Carver {
  std::byte* memory;
  size_t used = 0;

  std::byte* take(size_t num_bytes) {
    std::byte* part = memory == nullptr ? nullptr : memory + used;
    used += static_cast<size_t>(round_up(static_cast<int64_t>(num_bytes), 64));
    return part;
  }
};

Scratch carve(Carver& carver, int max_lines, int max_queries) {
  const auto lines = static_cast<size_t>(round_up(max_lines, kLanes));
  const size_t floats = lines * sizeof(float);
  Scratch scratch;
  scratch.q = carver.take(static_cast<size_t>(max_queries) * sizeof(float) * kMaxHeadDim);
  scratch.scores = reinterpret_cast<float*>(carver.take(floats * kBlockTokens));
  scratch.weights = carver.take(floats * kBlockTokens);
  scratch.factors = reinterpret_cast<float*>(carver.take(floats));
  scratch.sums = reinterpret_cast<float*>(carver.take(floats));
  scratch.peaks = reinterpret_cast<float*>(carver.take(floats));
  scratch.tail = carver.take(sizeof(float) * kMaxHeadDim);
  scratch.state = reinterpret_cast<float*>(
      carver.take(State::num_floats(max_lines, kMaxHeadDim) * sizeof(float)));
  return scratch;
}

}  // namespace

size_t Scratch::num_bytes(int max_lines, int max_queries) {
  Carver carver{nullptr};
  carve(carver, max_lines, max_queries);
  return carver.used;
}

Scratch Scratch::at(std::byte* memory, int max_lines, int max_queries) {
  Carver carver{memory};
  return carve(carver, max_lines, max_queries);
}

const Kernels& kernels_for(Isa isa, CacheType type) {
#if LAMINA_X86
  if (isa == Isa::avx512bf16 && type == CacheType::bfloat16) return kAvx512Bf16Kernels;
#endif
  const KernelTable& table = table_for(isa);
  switch (type) {
    case CacheType::float32: return table.float32;
    case CacheType::float16: return table.float16;
    case CacheType::bfloat16: return table.bfloat16;
    case CacheType::int8: return table.int8;
  }
  __builtin_unreachable();
}

void clear_state(const State& state, int lines, int dv_padded) {
  std::memset(state.acc, 0, static_cast<size_t>(lines) * static_cast<size_t>(dv_padded) * 4);
  for (int line = 0; line < lines; ++line) {
    state.peak[line] = -std::numeric_limits<float>::infinity();
    state.total[line] = 0.0f;
  }
}

}  // namespace lamina
