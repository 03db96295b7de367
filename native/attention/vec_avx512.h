// Sixteen float32 lanes in one register. Included only by files compiled for AVX-512; everything is
// local to the including file, so that no other file can end up with this code.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace lamina {
namespace {

struct Vec {
  __m512 x;
};

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v.x); }
inline Vec splat(float value) { return {_mm512_set1_ps(value)}; }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.x, b.x)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.x, b.x)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.x, b.x)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.x, b.x)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
/// b where either is NaN.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.x, b.x)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.x, b.x)}; }
inline float reduce_max(Vec v) { return _mm512_reduce_max_ps(v.x); }
inline float reduce_add(Vec v) { return _mm512_reduce_add_ps(v.x); }

/// `other` outside of lanes [lo, hi), 0 <= lo, hi <= 16.
inline Vec keep(Vec v, int lo, int hi, float other) {
  const auto mask = static_cast<__mmask16>(((1u << hi) - 1u) & ~((1u << lo) - 1u));
  return {_mm512_mask_mov_ps(_mm512_set1_ps(other), mask, v.x)};
}

/// 0 where v is -inf.
inline Vec finite_peak(Vec v) {
  const __mmask16 seen =
      _mm512_cmp_ps_mask(v.x, _mm512_set1_ps(-__builtin_inff()), _CMP_NEQ_UQ);
  return {_mm512_maskz_mov_ps(seen, v.x)};
}

inline Vec exp2(Vec v) {
  const __m512 x = _mm512_max_ps(_mm512_set1_ps(-200.0f), _mm512_min_ps(_mm512_set1_ps(127.0f), v.x));
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(1.540353e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return {_mm512_scalef_ps(p, whole)};
}

inline Vec load_f16(const void* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)))};
}
inline Vec load_bf16(const void* p) {
  const __m256i x = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
inline void store_f16(void* p, Vec v) {
  _mm256_storeu_si256(static_cast<__m256i*>(p),
                      _mm512_cvtps_ph(v.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_bf16(void* p, Vec v) {
  const __m512i bits = _mm512_castps_si512(v.x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v.x, v.x, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256(static_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

/// 16 pairs of bfloat16 -> their first and second elements.
inline void split_bf16(const void* p, Vec out[2]) {
  const __m512i x = _mm512_loadu_si512(p);
  out[0].x = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
  out[1].x = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(-65536)));
}
/// 16 groups of 4 bytes -> their first to fourth elements.
inline void split_i8(const void* p, Vec out[4]) {
  const __m512i x = _mm512_loadu_si512(p);
  out[0].x = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, 24), 24));
  out[1].x = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, 16), 24));
  out[2].x = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, 8), 24));
  out[3].x = _mm512_cvtepi32_ps(_mm512_srai_epi32(x, 24));
}
/// The same for bytes that are stored plus 128.
inline void split_u8(const void* p, Vec out[4]) {
  const __m512i x = _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
  out[0].x = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, 24), 24));
  out[1].x = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, 16), 24));
  out[2].x = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, 8), 24));
  out[3].x = _mm512_cvtepi32_ps(_mm512_srai_epi32(x, 24));
}

}  // namespace
}  // namespace lamina
