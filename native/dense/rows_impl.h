// Norms, activations, rotary embedding and sums. Included once per instruction set, after vec.h.
#pragma once

#include <algorithm>
#include <cmath>

#include "dense/kernels.h"
#include "dense/vec.h"

namespace lamina::dense {
namespace {

/// Calls f(row, head) for items [begin, end) of (row, head) pairs.
template <typename F>
LAMINA_INLINE void for_items(int64_t heads, int64_t begin, int64_t end, F&& f) {
  int64_t row = begin / heads;
  int64_t head = begin % heads;
  for (int64_t item = begin; item < end; ++item) {
    f(row, head);
    if (++head == heads) {
      head = 0;
      ++row;
    }
  }
}

/// e^x to about 2 ulp; 0 and infinity beyond float's range.
LAMINA_INLINE Vec exp(Vec x) {
  const Vec low = splat(-87.33654f), high = splat(88.72283f);
  Vec y = x < low ? low : x;
  y = y > high ? high : y;
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (y * 1.44269504f + shift) - shift;
  Vec r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // In two factors: 2^128 itself is not a float.
  const VecI exponent = __builtin_convertvector(n, VecI);
  const VecI half = exponent >> 1;
  const Vec first = (Vec)((half + 127) << 23), second = (Vec)((exponent - half + 127) << 23);
  p = p * first * second;
  p = x < low ? splat(0.0f) : p;
  p = x > high ? splat(INFINITY) : p;
  return x == x ? p : x;
}

LAMINA_INLINE Vec tanh_of(Vec x) { return 1.0f - 2.0f / (exp(x + x) + 1.0f); }

LAMINA_INLINE Vec erf_of(Vec x) {
  float lanes[kLanes];
  memcpy(lanes, &x, sizeof lanes);
  for (float& lane : lanes) lane = std::erf(lane);
  Vec y;
  memcpy(&y, lanes, sizeof y);
  return y;
}

template <Activation kind>
LAMINA_INLINE Vec activate(Vec x) {
  if constexpr (kind == Activation::silu) return x / (1.0f + exp(-x));
  if constexpr (kind == Activation::relu) return x < 0.0f ? splat(0.0f) : x;
  if constexpr (kind == Activation::gelu) return 0.5f * x * (1.0f + erf_of(x * 0.70710678f));
  return 0.5f * x * (1.0f + tanh_of(0.79788456f * (x + 0.044715f * x * x * x)));
}

template <typename E>
void norm(const NormJob& job, int64_t begin, int64_t end) {
  const int64_t width = job.x.width;
  const float scale = 1.0f / static_cast<float>(width);
  for_items(job.x.heads, begin, end, [&](int64_t row, int64_t head) {
    const E* x = job.x.at<E>(row, head);
    E* out = job.out.at<E>(row, head);
    float mean = 0.0f;
    if (job.kind == NormKind::layer) {
      Vec total{};
      for_pieces(width, [&](Piece piece) { total += piece.load(x); });
      mean = sum(total) * scale;
    }
    Vec squares{};
    for_pieces(width, [&](Piece piece) {
      Vec y = piece.load(x) - mean;
      if (piece.count < kLanes && mean != 0.0f) {  // lanes past the end hold -mean
        const VecI lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        y = lane < static_cast<int32_t>(piece.count) ? y : splat(0.0f);
      }
      squares += y * y;
    });
    const float factor = 1.0f / std::sqrt(sum(squares) * scale + job.eps);
    for_pieces(width, [&](Piece piece) {
      Vec y = (piece.load(x) - mean) * factor;
      if (job.kind == NormKind::rms) y = Type<E>::rounded(y);
      if (job.weight != nullptr) y *= piece.load(job.weight);
      if (job.bias != nullptr) y += piece.load(job.bias);
      piece.store(out, y);
    });
  });
}

template <typename E, Activation kind>
void activation_of(const ActivationJob& job, int64_t begin, int64_t end) {
  for_items(job.x.heads, begin, end, [&](int64_t row, int64_t head) {
    const E* x = job.x.at<E>(row, head);
    const E* gate = job.gate.data != nullptr ? job.gate.at<E>(row, head) : nullptr;
    E* out = job.out.at<E>(row, head);
    for_pieces(job.x.width, [&](Piece piece) {
      Vec y = activate<kind>(piece.load(x));
      if (gate != nullptr) y = Type<E>::rounded(y) * piece.load(gate);
      piece.store(out, y);
    });
  });
}

template <typename E>
void activation(const ActivationJob& job, int64_t begin, int64_t end) {
  switch (job.activation) {
    case Activation::silu: return activation_of<E, Activation::silu>(job, begin, end);
    case Activation::gelu_tanh: return activation_of<E, Activation::gelu_tanh>(job, begin, end);
    case Activation::gelu: return activation_of<E, Activation::gelu>(job, begin, end);
    case Activation::relu: return activation_of<E, Activation::relu>(job, begin, end);
  }
}

template <typename E>
void rotary(const RotaryJob& job, int64_t begin, int64_t end) {
  const int64_t half = job.cos.width / 2;
  for_items(job.x.heads, begin, end, [&](int64_t row, int64_t head) {
    const E* x = job.x.at<E>(row, head);
    E* out = job.out.at<E>(row, head);
    const E* cos = job.cos.at<E>(row);
    const E* sin = job.sin.at<E>(row);
    for_pieces(half, [&](Piece piece) {
      const Vec a = piece.load(x), b = piece.load(x + half);
      using T = Type<E>;
      piece.store(out, T::rounded(a * piece.load(cos)) - T::rounded(b * piece.load(sin)));
      piece.store(out + half,
                  T::rounded(b * piece.load(cos + half)) + T::rounded(a * piece.load(sin + half)));
    });
    const int64_t rotated = 2 * half;
    if (rotated < job.x.width) memcpy(out + rotated, x + rotated, (job.x.width - rotated) * sizeof(E));
  });
}

template <typename E>
void add(const AddJob& job, int64_t begin, int64_t end) {
  for_items(job.x.heads, begin, end, [&](int64_t row, int64_t head) {
    const E* x = job.x.at<E>(row, head);
    E* out = job.out.at<E>(row, head);
    if (job.other.data == nullptr) {
      memcpy(out, x, job.x.width * sizeof(E));
      return;
    }
    const E* other = job.other.at<E>(row, head);
    for_pieces(job.x.width,
               [&](Piece piece) { piece.store(out, piece.load(x) + piece.load(other)); });
  });
}

/// Index of the largest element, the first one of equals; NaN is larger than all. `value`: it.
template <typename E>
int64_t argmax(const void* data, int64_t width, float* value) {
  const E* x = static_cast<const E*>(data);
  const VecI lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Vec best = splat(-INFINITY);
  VecI at = lanes;
  VecI is_nan{};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const Vec y = Type<E>::load(x + i);
    const VecI larger = y > best;
    best = larger ? y : best;
    at = larger ? lanes + static_cast<int32_t>(i) : at;
    is_nan |= y != y;
  }
  int64_t index = 0;
  float largest = -INFINITY;
  bool found = false;
  const auto look = [&](float y, int64_t where) {
    if (y > largest || !found || (y == largest && where < index)) {
      largest = y;
      index = where;
      found = true;
    }
  };
  bool any_nan = false;
  if (i > 0) {
    for (int lane = 0; lane < kLanes; ++lane) {
      any_nan |= is_nan[lane] != 0;
      look(best[lane], at[lane]);
    }
  }
  const Vec rest = load_part(x + i, width - i);
  for (int64_t lane = 0; lane < width - i; ++lane) {
    any_nan |= rest[lane] != rest[lane];
    look(rest[lane], i + lane);
  }
  if (any_nan) {
    for (index = 0, i = 0; i < width; ++i) {
      const float y = load_part(x + i, 1)[0];
      if (y != y) {
        index = i;
        largest = y;
        break;
      }
    }
  }
  *value = largest;
  return index;
}

template <typename E>
constexpr Kernels table_of() {
  return {linear<E>, linear_scratch_bytes<E>, norm<E>, activation<E>, rotary<E>, add<E>,
          argmax<E>};
}

}  // namespace
}  // namespace lamina::dense
