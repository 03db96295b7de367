// Small things that the kernel files share. Included after their `Vec`; local to them.
#pragma once

#include "attention/kernels.h"

namespace lamina {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504088896f;
constexpr float kLn2 = 0.693147180559945f;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int clamp_lane(int64_t lane) { return static_cast<int>(larger(0, smaller(kLanes, lane))); }

/// Sixteen elements at p as float32.
inline Vec load_as(Dtype dtype, const std::byte* p) {
  switch (dtype) {
    case Dtype::float32: return load(reinterpret_cast<const float*>(p));
    case Dtype::float16: return load_f16(p);
    case Dtype::bfloat16: return load_bf16(p);
  }
  __builtin_unreachable();
}
inline void store_as(Dtype dtype, std::byte* p, const Vec& v) {
  switch (dtype) {
    case Dtype::float32: return store(reinterpret_cast<float*>(p), v);
    case Dtype::float16: return store_f16(p, v);
    case Dtype::bfloat16: return store_bf16(p, v);
  }
}

}  // namespace
}  // namespace lamina
