// The inner products: a register block of lines times columns of 16 lanes. Included by kernel files
// after their `Vec`; local to them.
//
// A `Math` says how one step multiplies: `Operand` is an element of the packed queries or weights,
// of which a step takes kStep; `Column` is what one column of keys or values is loaded into.
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

#include "attention/kernels.h"

namespace lamina {
namespace {

enum class Side { keys, values };

/// Float32 multiplication of any cache type.
template <CacheType kType, int kMostLines>
struct FloatMath {
  static constexpr CacheType kCacheType = kType;
  static constexpr int kStep = pack_tokens(kType);
  static constexpr int kMaxLines = kMostLines;
  using Operand = float;
  struct Column {
    Vec part[kStep];
  };

  template <Side side>
  [[gnu::always_inline]] static Column load_column(const std::byte* p) {
    Column column;
    if constexpr (kType == CacheType::float32) {
      column.part[0] = load(reinterpret_cast<const float*>(p));
    } else if constexpr (kType == CacheType::float16) {
      column.part[0] = load_f16(p);
    } else if constexpr (kType == CacheType::bfloat16) {
      split_bf16(p, column.part);
    } else if constexpr (side == Side::keys) {
      split_u8(p, column.part);
    } else {
      split_i8(p, column.part);
    }
    return column;
  }

  [[gnu::always_inline]] static void multiply_add(Vec& acc, const float* a, const Column& column) {
    for (int i = 0; i < kStep; ++i) acc = fma(splat(a[i]), column.part[i], acc);
  }
};

/// f(0), f(1), ..., f(N - 1), with constants.
template <int N, typename F>
[[gnu::always_inline]] inline void unroll(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

/// Where to prefetch, relative to what is being read: in its first half of the steps, and in the
/// second. The first half announces the second, and that the first half of what comes next.
struct Ahead {
  ptrdiff_t first, second;
};

/// For `steps` of `step_bytes` at `now`, after which `next` is read.
inline Ahead ahead_of(const std::byte* now, const std::byte* next, int steps,
                      ptrdiff_t step_bytes) {
  const ptrdiff_t half = steps / 2 * step_bytes;
  return {half, next - (now + half)};
}

/// acc[R][C] += a [R][steps] * b [steps][C].
template <typename Math, Side side, int R, int C, bool kPrefetch>
[[gnu::always_inline]] inline void multiply(const typename Math::Operand* a, ptrdiff_t a_stride,
                                            const std::byte* b, ptrdiff_t step_bytes,
                                            ptrdiff_t column_bytes, int steps, Ahead ahead,
                                            Vec (&acc)[R][C]) {
  const int half = kPrefetch ? steps / 2 : steps;
  ptrdiff_t distance = ahead.first;
  for (int step = 0; step < steps; ++step) {
    if (kPrefetch && step == half) distance = ahead.second;
    typename Math::Column columns[C];
    unroll<C>([&](auto c) __attribute__((always_inline)) {
      columns[c] = Math::template load_column<side>(b + c * column_bytes);
      if constexpr (kPrefetch) __builtin_prefetch(b + c * column_bytes + distance, 0, 2);
    });
    unroll<R>([&](auto r) __attribute__((always_inline)) {
      unroll<C>([&](auto c) __attribute__((always_inline)) {
        Math::multiply_add(acc[r][c], a + r * a_stride, columns[c]);
      });
    });
    a += Math::kStep;
    b += step_bytes;
  }
}

template <typename Math>
struct ScoreTile {
  const typename Math::Operand* q;
  ptrdiff_t q_stride;
  const std::byte* keys;
  ptrdiff_t step_bytes, column_bytes;
  int steps;
  Ahead ahead;
  float* scores;  // [lines][kBlockTokens]
};

/// Products of R lines and C times 16 tokens.
template <typename Math, int R, int C, bool kPrefetch>
void score_tile(const ScoreTile<Math>& t) {
  Vec acc[R][C];
  unroll<R>([&](auto r) { unroll<C>([&](auto c) { acc[r][c] = splat(0.0f); }); });
  multiply<Math, Side::keys, R, C, kPrefetch>(t.q, t.q_stride, t.keys, t.step_bytes,
                                              t.column_bytes, t.steps, t.ahead, acc);
  unroll<R>([&](auto r) {
    unroll<C>([&](auto c) { store(t.scores + r * kBlockTokens + c * kLanes, acc[r][c]); });
  });
}

template <typename Math>
struct ValueTile {
  const typename Math::Operand* weights;
  ptrdiff_t weights_stride;
  const std::byte* values;
  ptrdiff_t group_bytes;
  int steps;
  const std::byte* tail;  // one more group, or null
  Ahead ahead;
  const float* factors;  // [lines]
  float* acc;            // [lines][acc_stride]
  ptrdiff_t acc_stride;
};

/// acc = acc * factor + weights * values for R lines and C times 16 elements of the output.
template <typename Math, int R, int C, bool kPrefetch>
void value_tile(const ValueTile<Math>& t) {
  constexpr ptrdiff_t kColumnBytes = kLanes * Math::kStep * Math::kItemBytes;
  Vec acc[R][C];
  unroll<R>([&](auto r) {
    const Vec factor = splat(t.factors[r]);
    unroll<C>([&](auto c) { acc[r][c] = mul(load(t.acc + r * t.acc_stride + c * kLanes), factor); });
  });
  multiply<Math, Side::values, R, C, kPrefetch>(t.weights, t.weights_stride, t.values,
                                                t.group_bytes, kColumnBytes, t.steps, t.ahead, acc);
  if (t.tail != nullptr) {
    multiply<Math, Side::values, R, C, false>(t.weights + t.steps * Math::kStep, t.weights_stride,
                                              t.tail, 0, kColumnBytes, 1, {}, acc);
  }
  unroll<R>([&](auto r) {
    unroll<C>([&](auto c) { store(t.acc + r * t.acc_stride + c * kLanes, acc[r][c]); });
  });
}

}  // namespace
}  // namespace lamina
