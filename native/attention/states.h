// Merging partial results, and turning them into output. Included by kernel files after their `Vec`;
// local to them.
#pragma once

#include "attention/common.h"

namespace lamina {
namespace {

inline void merge(const State& into, const State& other, int lines, int dv_padded) {
  for (int line = 0; line < lines; ++line) {
    const Vec a = splat(into.peak[line]), b = splat(other.peak[line]);
    const Vec peak = max(a, b);
    const Vec base = finite_peak(peak);
    const Vec mine = exp2(sub(a, base)), theirs = exp2(sub(b, base));
    float* acc = into.acc + static_cast<ptrdiff_t>(line) * dv_padded;
    const float* more = other.acc + static_cast<ptrdiff_t>(line) * dv_padded;
    for (int d = 0; d < dv_padded; d += kLanes) {
      store(acc + d, fma(load(acc + d), mine, mul(load(more + d), theirs)));
    }
    float value[kLanes];
    store(value, fma(splat(into.total[line]), mine, mul(splat(other.total[line]), theirs)));
    into.total[line] = value[0];
    store(value, peak);
    into.peak[line] = value[0];
  }
}

inline void write(const WriteArgs& a) {
  const size_t item = item_bytes(a.dtype);
  for (int row = 0; row < a.num_rows; ++row) {
    for (int g = 0; g < a.group; ++g) {
      const int line = row * a.group + g;
      Vec peak = splat(a.state.peak[line]);
      Vec total = splat(a.state.total[line]);
      Vec factor = splat(1.0f);
      if (a.sinks != nullptr) {
        const Vec sink = splat(a.sinks[g] * kLog2E);
        const Vec before = peak;
        peak = max(before, sink);
        factor = exp2(sub(before, peak));
        total = fma(total, factor, exp2(sub(sink, peak)));
      }
      const bool empty = a.state.total[line] == 0.0f && a.sinks == nullptr;
      factor = empty ? splat(0.0f) : div(factor, total);
      const float* acc = a.state.acc + static_cast<ptrdiff_t>(line) * a.dv_padded;
      std::byte* out = a.out + static_cast<size_t>(row) * a.out_row_bytes +
                       static_cast<size_t>(g) * static_cast<size_t>(a.dv) * item;
      int d = 0;
      for (; d + kLanes <= a.dv; d += kLanes) {
        store_as(a.dtype, out + static_cast<size_t>(d) * item, mul(load(acc + d), factor));
      }
      if (d < a.dv) {
        std::byte rest[kLanes * sizeof(float)];
        store_as(a.dtype, rest, mul(load(acc + d), factor));
        __builtin_memcpy(out + static_cast<size_t>(d) * item, rest,
                         static_cast<size_t>(a.dv - d) * item);
      }
      if (a.lse != nullptr) {
        float values[2][kLanes];
        store(values[0], peak);
        store(values[1], total);
        a.lse[static_cast<size_t>(row) * a.lse_row_stride + static_cast<size_t>(g)] =
            empty ? -kInfinity : values[0][0] * kLn2 + __builtin_logf(values[1][0]);
      }
    }
  }
}

}  // namespace
}  // namespace lamina
