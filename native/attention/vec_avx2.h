// Sixteen float32 lanes in two registers. Included only by files compiled for AVX2 with FMA and F16C;
// everything is local to the including file, so that no other file can end up with this code.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace lamina {
namespace {

struct Vec {
  __m256 lo, hi;
};

inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Vec v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
inline Vec splat(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
/// b where either is NaN.
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }

inline float reduce_max(Vec v) {
  const __m256 m = _mm256_max_ps(v.lo, v.hi);
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline float reduce_add(Vec v) {
  const __m256 m = _mm256_add_ps(v.lo, v.hi);
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}

inline __m256 keep_half(__m256 v, __m256i lane, int lo, int hi, float other) {
  const __m256i out = _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(lo), lane),
                                      _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(hi - 1)));
  return _mm256_blendv_ps(v, _mm256_set1_ps(other), _mm256_castsi256_ps(out));
}
/// `other` outside of lanes [lo, hi), 0 <= lo, hi <= 16.
inline Vec keep(Vec v, int lo, int hi, float other) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {keep_half(v.lo, lane, lo, hi, other),
          keep_half(v.hi, _mm256_add_epi32(lane, _mm256_set1_epi32(8)), lo, hi, other)};
}

inline __m256 finite_peak_half(__m256 v) {
  const __m256 seen = _mm256_cmp_ps(v, _mm256_set1_ps(-__builtin_inff()), _CMP_NEQ_UQ);
  return _mm256_and_ps(v, seen);
}
/// 0 where v is -inf.
inline Vec finite_peak(Vec v) { return {finite_peak_half(v.lo), finite_peak_half(v.hi)}; }

inline __m256 exp2_half(__m256 v) {
  // Below -126 the result is 0; NaN stays NaN.
  const __m256 is_normal = _mm256_cmp_ps(v, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
  const __m256 x = _mm256_max_ps(_mm256_set1_ps(-126.0f), _mm256_min_ps(_mm256_set1_ps(127.0f), v));
  const __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 f = _mm256_sub_ps(x, whole);
  __m256 p = _mm256_set1_ps(1.540353e-4f);
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.3333558e-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.6181291e-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.5504109e-2f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.4022651e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(6.9314718e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
  const __m256i exponent =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
  return _mm256_and_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(exponent)), is_normal);
}
inline Vec exp2(Vec v) { return {exp2_half(v.lo), exp2_half(v.hi)}; }

inline Vec load_f16(const void* p) {
  const auto* x = static_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(x)), _mm256_cvtph_ps(_mm_loadu_si128(x + 1))};
}
inline __m256 widen_bf16(__m128i x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
inline Vec load_bf16(const void* p) {
  const auto* x = static_cast<const __m128i*>(p);
  return {widen_bf16(_mm_loadu_si128(x)), widen_bf16(_mm_loadu_si128(x + 1))};
}
inline void store_f16(void* p, Vec v) {
  auto* x = static_cast<__m128i*>(p);
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(x, _mm256_cvtps_ph(v.lo, kMode));
  _mm_storeu_si128(x + 1, _mm256_cvtps_ph(v.hi, kMode));
}
inline __m256i narrow_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
}
inline void store_bf16(void* p, Vec v) {
  const __m256i packed = _mm256_packus_epi32(narrow_bf16(v.lo), narrow_bf16(v.hi));
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

/// 16 pairs of bfloat16 -> their first and second elements.
inline void split_bf16(const void* p, Vec out[2]) {
  const auto* x = static_cast<const __m256i*>(p);
  const __m256i lo = _mm256_loadu_si256(x), hi = _mm256_loadu_si256(x + 1);
  const __m256i second = _mm256_set1_epi32(-65536);
  out[0] = {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
  out[1] = {_mm256_castsi256_ps(_mm256_and_si256(lo, second)),
            _mm256_castsi256_ps(_mm256_and_si256(hi, second))};
}
template <int kByte>
inline __m256 signed_byte(__m256i x) {
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x, 24 - 8 * kByte), 24));
}
inline void split_bytes(__m256i lo, __m256i hi, Vec out[4]) {
  out[0] = {signed_byte<0>(lo), signed_byte<0>(hi)};
  out[1] = {signed_byte<1>(lo), signed_byte<1>(hi)};
  out[2] = {signed_byte<2>(lo), signed_byte<2>(hi)};
  out[3] = {signed_byte<3>(lo), signed_byte<3>(hi)};
}
/// 16 groups of 4 bytes -> their first to fourth elements.
inline void split_i8(const void* p, Vec out[4]) {
  const auto* x = static_cast<const __m256i*>(p);
  split_bytes(_mm256_loadu_si256(x), _mm256_loadu_si256(x + 1), out);
}
/// The same for bytes that are stored plus 128.
inline void split_u8(const void* p, Vec out[4]) {
  const auto* x = static_cast<const __m256i*>(p);
  const __m256i sign = _mm256_set1_epi8(-128);
  split_bytes(_mm256_xor_si256(_mm256_loadu_si256(x), sign),
              _mm256_xor_si256(_mm256_loadu_si256(x + 1), sign), out);
}

}  // namespace
}  // namespace lamina
