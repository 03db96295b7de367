// The inner products: a register block of lines times columns of 16 lanes. Included by kernel files
// after their `Vec`; local to them.
//
// A `Math` says how one step of kStep elements (of a key, or of tokens) multiplies: `Operand` is what
// packed queries and weights consist of, kOperandsPerStep for a step and kRowExtra at the end of a
// row; `Column` is what one column of keys or values is loaded into, `Sum` what products add up in.
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
  using Sum = Vec;
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

  template <Side side>
  [[gnu::always_inline]] static void multiply_add(Vec& sum, const float* a, const Column& column) {
    for (int i = 0; i < kStep; ++i) sum = fma(splat(a[i]), column.part[i], sum);
  }
  [[gnu::always_inline]] static Vec zero() { return splat(0.0f); }
  template <Side side>
  [[gnu::always_inline]] static Vec product(Vec sum, const float* row_end) {
    return sum;
  }
};

/// f(0), f(1), ..., f(N - 1), with constants.
template <int N, typename F>
[[gnu::always_inline]] inline void unroll(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

constexpr ptrdiff_t kCacheLine = 64;

/// What to fetch into the second-level cache while computing: in each step `lines` cache lines, and
/// from step to step `step_bytes` further on. The machine drops what it cannot take at once, so that
/// fetches are spread evenly over the steps.
struct Ahead {
  const std::byte* next;
  int lines;
  ptrdiff_t step_bytes;

  [[gnu::always_inline]] void fetch() {
    for (int i = 0; i < lines; ++i) __builtin_prefetch(next + i * kCacheLine, 0, 2);
    next += step_bytes;
  }
};

/// acc[R][C] += a [R][steps] * b [steps][C]. Fetches what is ahead.
template <typename Math, Side side, int R, int C>
[[gnu::always_inline]] inline void multiply(const typename Math::Operand* a, ptrdiff_t a_stride,
                                            const std::byte* b, ptrdiff_t step_bytes,
                                            ptrdiff_t column_bytes, int steps,
                                            Ahead ahead, typename Math::Sum (&acc)[R][C]) {
  for (int step = 0; step < steps; ++step) {
    typename Math::Column columns[C];
    unroll<C>([&](auto c) __attribute__((always_inline)) {
      columns[c] = Math::template load_column<side>(b + c * column_bytes);
    });
    unroll<R>([&](auto r) __attribute__((always_inline)) {
      unroll<C>([&](auto c) __attribute__((always_inline)) {
        Math::template multiply_add<side>(acc[r][c], a + r * a_stride, columns[c]);
      });
    });
    ahead.fetch();
    a += Math::kOperandsPerStep;
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
template <typename Math, int R, int C>
void score_tile(const ScoreTile<Math>& t) {
  typename Math::Sum acc[R][C];
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    unroll<C>([&](auto c) __attribute__((always_inline)) { acc[r][c] = Math::zero(); });
  });
  multiply<Math, Side::keys, R, C>(t.q, t.q_stride, t.keys, t.step_bytes,
                                              t.column_bytes, t.steps, t.ahead, acc);
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    const auto* row_end = t.q + r * t.q_stride + t.steps * Math::kOperandsPerStep;
    unroll<C>([&](auto c) __attribute__((always_inline)) {
      store(t.scores + r * kBlockTokens + c * kLanes,
            Math::template product<Side::keys>(acc[r][c], row_end));
    });
  });
}

template <typename Math>
struct ValueTile {
  const typename Math::Operand* weights;
  const typename Math::Operand* row_ends;
  ptrdiff_t weights_stride;
  const std::byte* values;
  ptrdiff_t group_bytes;
  int steps;
  Ahead ahead;
  const float* factors;  // [lines]
  float* acc;            // [lines][acc_stride]
  ptrdiff_t acc_stride;
};

/// acc = acc * factor + weights * values for R lines and C times 16 elements of the output.
template <typename Math, int R, int C>
void value_tile(const ValueTile<Math>& t) {
  constexpr ptrdiff_t kColumnBytes = kLanes * Math::kStep * Math::kItemBytes;
  typename Math::Sum acc[R][C];
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    unroll<C>([&](auto c) __attribute__((always_inline)) { acc[r][c] = Math::zero(); });
  });
  multiply<Math, Side::values, R, C>(t.weights, t.weights_stride, t.values,
                                                t.group_bytes, kColumnBytes, t.steps, t.ahead, acc);
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    const Vec factor = splat(t.factors[r]);
    const auto* row_end = t.row_ends + r * t.weights_stride;
    unroll<C>([&](auto c) __attribute__((always_inline)) {
      float* to = t.acc + r * t.acc_stride + c * kLanes;
      store(to, fma(load(to), factor, Math::template product<Side::values>(acc[r][c], row_end)));
    });
  });
}

}  // namespace
}  // namespace lamina
