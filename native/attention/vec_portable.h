// Sixteen float32 lanes as plain loops, which compilers turn into what the machine has.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace lamina {
namespace {

struct alignas(64) Vec {
  float x[16];
};

template <typename Of>
inline Vec make(Of of) {
  Vec v;
  for (int i = 0; i < 16; ++i) v.x[i] = of(i);
  return v;
}

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(v.x, p, sizeof v.x);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, v.x, sizeof v.x); }
inline Vec splat(float value) {
  return make([=](int) { return value; });
}
inline Vec add(const Vec& a, const Vec& b) {
  return make([&](int i) { return a.x[i] + b.x[i]; });
}
inline Vec sub(const Vec& a, const Vec& b) {
  return make([&](int i) { return a.x[i] - b.x[i]; });
}
inline Vec mul(const Vec& a, const Vec& b) {
  return make([&](int i) { return a.x[i] * b.x[i]; });
}
inline Vec div(const Vec& a, const Vec& b) {
  return make([&](int i) { return a.x[i] / b.x[i]; });
}
inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
  return make([&](int i) { return a.x[i] * b.x[i] + c.x[i]; });
}
/// b where either is NaN.
inline Vec max(const Vec& a, const Vec& b) {
  return make([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
}
inline Vec min(const Vec& a, const Vec& b) {
  return make([&](int i) { return a.x[i] < b.x[i] ? a.x[i] : b.x[i]; });
}
inline float reduce_max(const Vec& v) {
  float result = v.x[0];
  for (int i = 1; i < 16; ++i) result = result > v.x[i] ? result : v.x[i];
  return result;
}
inline float reduce_add(const Vec& v) {
  float sums[4] = {v.x[0], v.x[1], v.x[2], v.x[3]};
  for (int i = 4; i < 16; ++i) sums[i % 4] += v.x[i];
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

/// `other` outside of lanes [lo, hi), 0 <= lo, hi <= 16.
inline Vec keep(const Vec& v, int lo, int hi, float other) {
  return make([&](int i) { return lo <= i && i < hi ? v.x[i] : other; });
}
/// 0 where v is -inf.
inline Vec finite_peak(const Vec& v) {
  return make([&](int i) { return v.x[i] == -__builtin_inff() ? 0.0f : v.x[i]; });
}

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float exp2_one(float v) {
  if (v < -126.0f) return 0.0f;
  if (!(v == v)) return v;
  const float x = v < 127.0f ? v : 127.0f;
  // Adding 1.5 * 2^23 rounds to the nearest whole number.
  const float whole = (x + 12582912.0f) - 12582912.0f;
  const float f = x - whole;
  float p = 1.540353e-4f;
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return p * float_of_bits(static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23);
}
inline Vec exp2(const Vec& v) {
  return make([&](int i) { return exp2_one(v.x[i]); });
}

template <typename T>
inline T element(const void* p, int i) {
  T value;
  std::memcpy(&value, static_cast<const std::byte*>(p) + static_cast<size_t>(i) * sizeof(T),
              sizeof(T));
  return value;
}
template <typename T>
inline void put_element(void* p, int i, T value) {
  std::memcpy(static_cast<std::byte*>(p) + static_cast<size_t>(i) * sizeof(T), &value, sizeof(T));
}

inline float widen_bf16(uint16_t x) { return float_of_bits(static_cast<uint32_t>(x) << 16); }

inline Vec load_f16(const void* p) {
  return make([&](int i) { return static_cast<float>(element<_Float16>(p, i)); });
}
inline Vec load_bf16(const void* p) {
  return make([&](int i) { return widen_bf16(element<uint16_t>(p, i)); });
}
inline void store_f16(void* p, const Vec& v) {
  for (int i = 0; i < 16; ++i) put_element(p, i, static_cast<_Float16>(v.x[i]));
}
inline void store_bf16(void* p, const Vec& v) {
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = bits_of_float(v.x[i]);
    const uint32_t rounded = v.x[i] == v.x[i] ? bits + 0x7fff + ((bits >> 16) & 1) : 0x7fc00000;
    put_element(p, i, static_cast<uint16_t>(rounded >> 16));
  }
}

/// 16 pairs of bfloat16 -> their first and second elements.
inline void split_bf16(const void* p, Vec out[2]) {
  for (int part = 0; part < 2; ++part) {
    out[part] = make([&](int i) { return widen_bf16(element<uint16_t>(p, 2 * i + part)); });
  }
}
/// 16 groups of 4 bytes -> their first to fourth elements.
inline void split_i8(const void* p, Vec out[4]) {
  for (int part = 0; part < 4; ++part) {
    out[part] = make([&](int i) { return static_cast<float>(element<int8_t>(p, 4 * i + part)); });
  }
}
/// The same for bytes that are stored plus 128.
inline void split_u8(const void* p, Vec out[4]) {
  for (int part = 0; part < 4; ++part) {
    out[part] =
        make([&](int i) { return static_cast<float>(element<uint8_t>(p, 4 * i + part)) - 128.0f; });
  }
}

}  // namespace
}  // namespace lamina
