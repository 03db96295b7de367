// Sixteen floats at a time, in terms that the compiler maps to any instruction set. Everything is
// in an unnamed namespace: each file that includes this is compiled for another instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wunused-function"

namespace lamina::dense {
namespace {

constexpr int kLanes = 16;

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t VecI __attribute__((vector_size(64)));
typedef uint32_t VecU __attribute__((vector_size(64)));
typedef uint16_t VecH __attribute__((vector_size(32)));

#define LAMINA_INLINE inline __attribute__((always_inline))

LAMINA_INLINE Vec splat(float x) { return Vec{} + x; }

LAMINA_INLINE VecH round_to_bf16(Vec x) {
  VecU bits = (VecU)x;
  VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecI is_number = x == x;
  rounded = is_number ? rounded : (VecU{} + 0x7fc0u);
  return __builtin_convertvector(rounded, VecH);
}

struct Bf16 {
  uint16_t bits;
};

/// How one element type is read, written and rounded.
template <typename E>
struct Type;

template <>
struct Type<float> {
  static LAMINA_INLINE Vec load(const float* p) {
    Vec x;
    memcpy(&x, p, sizeof x);
    return x;
  }
  static LAMINA_INLINE void store(float* p, Vec x) { memcpy(p, &x, sizeof x); }
  static LAMINA_INLINE Vec rounded(Vec x) { return x; }
};

template <>
struct Type<Bf16> {
  static LAMINA_INLINE Vec load(const Bf16* p) {
    VecH half;
    memcpy(&half, p, sizeof half);
    return (Vec)(__builtin_convertvector(half, VecU) << 16);
  }
  static LAMINA_INLINE void store(Bf16* p, Vec x) {
    const VecH half = round_to_bf16(x);
    memcpy(p, &half, sizeof half);
  }
  static LAMINA_INLINE Vec rounded(Vec x) {
    return (Vec)(__builtin_convertvector(round_to_bf16(x), VecU) << 16);
  }
};

/// The first `count` < 16 elements; the other lanes are zero.
template <typename E>
LAMINA_INLINE Vec load_part(const E* p, int64_t count) {
  E part[kLanes] = {};
  memcpy(part, p, count * sizeof(E));
  return Type<E>::load(part);
}

template <typename E>
LAMINA_INLINE void store_part(E* p, Vec x, int64_t count) {
  E part[kLanes];
  Type<E>::store(part, x);
  memcpy(p, part, count * sizeof(E));
}

/// Sixteen elements of an array, or as many as are left.
struct Piece {
  int64_t begin;
  int64_t count;

  template <typename E>
  LAMINA_INLINE Vec load(const E* p) const {
    return count == kLanes ? Type<E>::load(p + begin) : load_part(p + begin, count);
  }
  template <typename E>
  LAMINA_INLINE void store(E* p, Vec x) const {
    if (count == kLanes) {
      Type<E>::store(p + begin, x);
    } else {
      store_part(p + begin, x, count);
    }
  }
};

/// Calls f(piece) for all pieces of `count` elements.
template <typename F>
LAMINA_INLINE void for_pieces(int64_t count, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(Piece{i, kLanes});
  if (i < count) f(Piece{i, count - i});
}

LAMINA_INLINE float sum(Vec x) {
  float lanes[kLanes];
  memcpy(lanes, &x, sizeof lanes);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

}  // namespace
}  // namespace lamina::dense
