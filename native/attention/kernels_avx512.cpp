// clang-format off: Vec comes before what is written in terms of it
#include "attention/vec_avx512.h"
#include "attention/attend.h"
// clang-format on
#include "attention/kernel_tables.h"

namespace lamina {
namespace {

/// int8 caches with dot products of bytes. Queries and weights are 16-bit whole numbers in two bytes,
/// high and low, so that about 15 bits of them count; sums are exact.
struct ByteMath {
  static constexpr CacheType kCacheType = CacheType::int8;
  static constexpr int kStep = 4;
  static constexpr int kOperandsPerStep = 2;  // four high bytes, four low bytes
  static constexpr int kRowExtra = 2;         // the row's scale and, for queries, the correction
  static constexpr int kItemBytes = 1;
  static constexpr int kMaxLines = 2;
  static constexpr int kMaxColumns = 4;
  static constexpr int kNearLines = 0;
  static constexpr int kValueLines = 2, kValueColumns = 4;
  static constexpr int kQueryBase = 128, kWeightBase = 256;  // what a high byte counts
  using Operand = int32_t;
  struct Sum {
    __m512i high, low;
  };
  struct Column {
    __m512i bytes;
  };

  template <Side side>
  [[gnu::always_inline]] static Column load_column(const std::byte* p) {
    return {_mm512_loadu_si512(p)};
  }

  /// Unsigned are the keys (plus 128) on the one side, the weights on the other.
  template <Side side>
  [[gnu::always_inline]] static void multiply_add(Sum& sum, const int32_t* a,
                                                  const Column& column) {
    const __m512i high = _mm512_set1_epi32(a[0]), low = _mm512_set1_epi32(a[1]);
    if constexpr (side == Side::keys) {
      sum.high = _mm512_dpbusd_epi32(sum.high, column.bytes, high);
      sum.low = _mm512_dpbusd_epi32(sum.low, column.bytes, low);
    } else {
      sum.high = _mm512_dpbusd_epi32(sum.high, high, column.bytes);
      sum.low = _mm512_dpbusd_epi32(sum.low, low, column.bytes);
    }
  }

  [[gnu::always_inline]] static Sum zero() {
    return {_mm512_setzero_si512(), _mm512_setzero_si512()};
  }

  template <Side side>
  [[gnu::always_inline]] static Vec product(const Sum& sum, const int32_t* row_end) {
    constexpr int kShift = side == Side::keys ? 7 : 8;
    __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(sum.high, kShift), sum.low);
    if constexpr (side == Side::keys) {
      whole = _mm512_sub_epi32(whole, _mm512_set1_epi32(row_end[1]));
    }
    float scale;
    __builtin_memcpy(&scale, row_end, sizeof scale);
    return mul({_mm512_cvtepi32_ps(whole)}, splat(scale));
  }

  /// Sixteen numbers as four steps of operands.
  static void put(__m512i high, __m512i low, int32_t* to) {
    const __m128i h = _mm512_cvtepi32_epi8(high), l = _mm512_cvtepi32_epi8(low);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi32(h, l));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 4), _mm_unpackhi_epi32(h, l));
  }

  static void pack_queries(const AttendArgs& a, int head, int32_t* q) {
    constexpr float kMost = 127.0f * kQueryBase;
    const int dk = a.pages.layout->dk_padded;
    for (int line = 0; line < a.num_rows * a.group; ++line) {
      float wide[256 + kLanes];
      widen_query(a, query(a, head, line), wide);
      const int rounded = static_cast<int>(round_up(dk, kLanes));
      for (int d = dk; d < rounded; ++d) wide[d] = 0.0f;
      Vec peaks = splat(0.0f);
      for (int d = 0; d < rounded; d += kLanes) {
        peaks = max(peaks, {_mm512_abs_ps(load(wide + d).x)});
      }
      const float peak = reduce_max(peaks);
      const Vec inverse = splat(peak > 0.0f ? kMost / peak : 0.0f);
      __m512i sum = _mm512_setzero_si512();
      for (int d = 0; d < rounded; d += kLanes) {
        const __m512i number = _mm512_cvtps_epi32(mul(load(wide + d), inverse).x);
        const __m512i high =
            _mm512_srai_epi32(_mm512_add_epi32(number, _mm512_set1_epi32(kQueryBase / 2)), 7);
        put(high, _mm512_sub_epi32(number, _mm512_slli_epi32(high, 7)), q + d / 2);
        sum = _mm512_add_epi32(sum, number);
      }
      q += dk / kStep * kOperandsPerStep;
      // A query that is not a number makes its scores so, through the scale.
      const float scale = peak == peak ? peak / kMost : peak;
      __builtin_memcpy(q, &scale, sizeof scale);
      q[1] = 128 * _mm512_reduce_add_epi32(sum);
      q += kRowExtra;
    }
  }

  /// The values' scales are part of the weights.
  static float weigh(const float* scores, float peak, const float* v_scales, int num_lane_blocks,
                     Visible visible, int32_t* weights) {
    constexpr float kMost = 255.0f * kWeightBase + 255.0f;
    Vec w[kBlockTokens / kLanes];
    Vec sum = splat(0.0f), peaks = splat(0.0f);
    for (int b = 0; b < num_lane_blocks; ++b) {
      const Vec p = exp2(sub(load(scores + b * kLanes), splat(peak)));
      sum = add(sum, p);
      Vec scale = load(v_scales + b * kLanes);
      if (!visible.all) {
        scale = keep(scale, clamp_lane(visible.lo - b * kLanes),
                     clamp_lane(visible.hi - b * kLanes), 0.0f);
      }
      w[b] = mul(p, scale);
      peaks = max(peaks, w[b]);
    }
    const float most = reduce_max(peaks);
    const Vec inverse = splat(most > 0.0f ? kMost / most : 0.0f);
    for (int b = 0; b < num_lane_blocks; ++b) {
      const __m512i number = _mm512_cvtps_epi32(mul(w[b], inverse).x);
      put(_mm512_srli_epi32(number, 8), _mm512_and_si512(number, _mm512_set1_epi32(255)),
          weights + b * kLanes / kStep * kOperandsPerStep);
    }
    const float scale = most / kMost;
    __builtin_memcpy(weights + kBlockTokens / kStep * kOperandsPerStep, &scale, sizeof scale);
    return reduce_add(sum);
  }
};

}  // namespace

const KernelTable kAvx512Kernels = {
    {&attend<PlainMath<CacheType::float32, 4, 4>>, &merge, &write},
    {&attend<PlainMath<CacheType::float16, 4, 4>>, &merge, &write},
    {&attend<PlainMath<CacheType::bfloat16, 4, 4>>, &merge, &write},
    {&attend<ByteMath>, &merge, &write},
};

}  // namespace lamina
