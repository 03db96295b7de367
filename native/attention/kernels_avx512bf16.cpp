// bfloat16 caches with dot products of bfloat16 pairs.

// clang-format off: Vec comes before what is written in terms of it
#include "attention/vec_avx512.h"
#include "attention/attend.h"
// clang-format on
#include "attention/kernel_tables.h"

namespace lamina {
namespace {

/// Queries and weights are bfloat16; sums of products are float32.
struct Bf16Math {
  static constexpr CacheType kCacheType = CacheType::bfloat16;
  static constexpr int kStep = 2;
  static constexpr int kOperandsPerStep = 2;
  static constexpr int kRowExtra = 0;
  static constexpr int kItemBytes = 2;
  static constexpr int kMaxLines = 6;
  static constexpr int kMaxColumns = 4;
  static constexpr int kNearLines = 4;
  static constexpr int kValueLines = 2, kValueColumns = 8;
  using Operand = uint16_t;
  using Sum = Vec;
  struct Column {
    __m512i pairs;
  };

  template <Side side>
  [[gnu::always_inline]] static Column load_column(const std::byte* p) {
    return {_mm512_loadu_si512(p)};
  }

  template <Side side>
  [[gnu::always_inline]] static void multiply_add(Vec& acc, const uint16_t* a,
                                                  const Column& column) {
    int pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    acc.x = _mm512_dpbf16_ps(acc.x, reinterpret_cast<__m512bh>(column.pairs),
                             reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)));
  }

  [[gnu::always_inline]] static Vec zero() { return splat(0.0f); }
  template <Side side>
  [[gnu::always_inline]] static Vec product(Vec sum, const uint16_t* row_end) {
    return sum;
  }

  static void pack_queries(const AttendArgs& a, int head, uint16_t* q) {
    const auto dk = static_cast<size_t>(a.pages.layout->dk);
    const auto padded = static_cast<size_t>(a.pages.layout->dk_padded);
    for (int line = 0; line < a.num_rows * a.group; ++line, q += padded) {
      __builtin_memcpy(q, query(a, head, line), dk * sizeof *q);
      for (size_t d = dk; d < padded; ++d) q[d] = 0;
    }
  }

  /// The sum is that of the rounded weights, so that rounding does not bias the result.
  static float weigh(const float* scores, float peak, const float* v_scales, int num_lane_blocks,
                     Visible visible, uint16_t* weights) {
    Vec sum = splat(0.0f);
    for (int b = 0; b < num_lane_blocks; ++b) {
      const Vec w = exp2(sub(load(scores + b * kLanes), splat(peak)));
      const auto rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(w.x));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + b * kLanes), rounded);
      sum.x = _mm512_add_ps(
          sum.x, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16)));
    }
    return reduce_add(sum);
  }
};

}  // namespace

const Kernels kAvx512Bf16Kernels = {&attend<Bf16Math>, &merge, &write};

}  // namespace lamina
