// Attention of a tile of lines over paged tokens, with an online softmax per block of tokens.
// Included by kernel files after their `Vec`; local to them.
#pragma once

#include "attention/products.h"
#include "attention/states.h"
#include "attention/walk.h"

namespace lamina {
namespace {

/// Lines of several heads are worked on together, up to this many: the keys of all heads, then their
/// values are read from front to back, and no softmax waits for itself.
constexpr int kLinesTogether = 64;

/// Up to Math::kNearLines lines of a head are computed faster than memory delivers. Keys and values then
/// come as a stream that the machine follows by itself; it only has to be told early enough of what
/// lies some way ahead, as it stops at the ends of 4 KiB pages.
constexpr ptrdiff_t kNearKeyBytes = 4096;
constexpr int kNearKeyLines = 2, kNearValueLines = 4;
/// Cache lines of values that are fetched per line while its softmax computes, twice.
constexpr int kSoftmaxFetches = 8;

inline void fetch(const std::byte*& next) {
  for (int i = 0; i < kSoftmaxFetches; ++i, next += kCacheLine) __builtin_prefetch(next, 0, 2);
}

/// The last group of values, with zeros for tokens that the range does not have: what lies there may
/// be anything, and not a number times a weight of zero is not zero.
template <typename Math>
const std::byte* masked_group(const std::byte* group, int tokens, const PageLayout& layout,
                              std::byte* to) {
  const auto bits = static_cast<unsigned>(8 * Math::kItemBytes * tokens);
  const uint32_t mask = (uint32_t{1} << bits) - 1;
  const size_t words = layout.v_group_bytes / sizeof(uint32_t);
  for (size_t i = 0; i < words; ++i) {
    uint32_t word;
    __builtin_memcpy(&word, group + i * sizeof word, sizeof word);
    word &= mask;
    __builtin_memcpy(to + i * sizeof word, &word, sizeof word);
  }
  return to;
}

/// The lanes of a block that a line sees.
struct Visible {
  int lo, hi;
  bool all;
};

/// Products -> scores; returns their maximum.
inline float finish_scores(float* scores, const AttendArgs& a, const float* k_scales,
                           int num_lane_blocks, Visible visible) {
  Vec peak = splat(-kInfinity);
  for (int b = 0; b < num_lane_blocks; ++b) {
    Vec s = mul(load(scores + b * kLanes), splat(a.scale2));
    if (k_scales != nullptr) s = mul(s, load(k_scales + b * kLanes));
    if (a.cap2 != 0.0f) {
      // tanh(x) = 1 - 2 / (exp(2 x) + 1)
      const Vec e = exp2(mul(s, splat(2.0f * kLog2E)));
      const Vec tanh = sub(splat(1.0f), div(splat(2.0f), add(e, splat(1.0f))));
      s = mul(tanh, splat(a.cap2));
    }
    if (!visible.all) {
      s = keep(s, clamp_lane(visible.lo - b * kLanes), clamp_lane(visible.hi - b * kLanes),
               -kInfinity);
    }
    store(scores + b * kLanes, s);
    peak = max(peak, s);
  }
  return reduce_max(peak);
}

template <typename Math>
void attend(const AttendArgs& a) {
  const PageLayout& layout = *a.pages.layout;
  const int lines = a.num_rows * a.group;
  const Scratch& scratch = a.scratch;
  auto* q = reinterpret_cast<typename Math::Operand*>(scratch.q);
  auto* weights = reinterpret_cast<typename Math::Operand*>(scratch.weights);
  const ptrdiff_t q_stride = layout.dk_padded / Math::kStep * Math::kOperandsPerStep + Math::kRowExtra;
  constexpr ptrdiff_t kWeightsStride = kBlockTokens / Math::kStep * Math::kOperandsPerStep + Math::kRowExtra;
  const auto state_floats =
      static_cast<ptrdiff_t>(State::num_floats(lines, layout.dv_padded));
  for (int head = 0; head < a.num_heads; ++head) {
    Math::pack_queries(a, head, q + head * lines * q_stride);
  }

  const int64_t begin = larger(a.begin, a.first_position - a.window + 1);
  const int64_t end = smaller(a.end, a.first_position + a.num_rows);
  if (begin >= end) return;
  const int64_t last_row_begin = larger(a.begin, a.first_position + a.num_rows - a.window);
  const int64_t first_row_end = smaller(a.end, a.first_position + 1);

  const int heads_together =
      static_cast<int>(larger(1, smaller(a.num_heads, kLinesTogether / lines)));
  const auto k_head_bytes = static_cast<ptrdiff_t>(layout.k_head_bytes);
  const auto v_head_bytes = static_cast<ptrdiff_t>(layout.v_head_bytes);
  const int key_steps = layout.dk_padded / Math::kStep;
  const auto key_step_bytes = static_cast<ptrdiff_t>(layout.k_step_bytes);
  const auto group_bytes = static_cast<ptrdiff_t>(layout.v_group_bytes);

  // Where memory is waited for, from within what is being read; else from where comes next.
  const bool near = lines <= Math::kNearLines;
  constexpr int kAllLines = 8;

  BlockWalk walk(a, heads_together, begin, end);
  Block block = walk.next();
  for (bool more = true; more;) {
    more = !walk.is_done();
    const Block next = more ? walk.next() : block;
    const int num_heads = static_cast<int>(smaller(heads_together, a.num_heads - block.head));
    const int num_lane_blocks = block.num_lane_blocks;
    const int64_t first = block.first_token;
    for (int head = 0; head < num_heads; ++head) {
      const std::byte* keys = block.keys + head * k_head_bytes;
      const std::byte* then = head + 1 < num_heads ? keys + k_head_bytes : block.values;
      const std::byte* from = near ? keys + kNearKeyBytes : then;
      const Fetches fetches{from, from + k_head_bytes, near ? kNearKeyLines : kAllLines};
      multiply_keys<Math>(
          {q + (block.head + head) * lines * q_stride, q_stride, keys, key_step_bytes,
           static_cast<ptrdiff_t>(layout.k_column_bytes), key_steps,
           {},
           scratch.scores + head * lines * kBlockTokens},
          lines, num_lane_blocks, fetches);
      if (Math::kCacheType == CacheType::int8) {
        for (size_t i = 0; i < layout.scale_head_bytes; i += kCacheLine) {
          const size_t offset = static_cast<size_t>(head) * layout.scale_head_bytes + i;
          __builtin_prefetch(block.k_scales + offset);
          __builtin_prefetch(block.v_scales + offset);
        }
      }
    }

    const bool all = first >= last_row_begin && block.stop_token <= first_row_end &&
                     block.stop_token == first + num_lane_blocks * kLanes;
    const auto visible = [&](int row) -> Visible {
      const int64_t position = a.first_position + row;
      const int64_t lo = larger(begin, position - a.window + 1) - first;
      const int64_t hi = smaller(block.stop_token, position + 1) - first;
      return {static_cast<int>(larger(lo, 0)), static_cast<int>(larger(hi, 0)), all};
    };
    const auto state_of = [&](int head) {
      return State::at(a.state.acc + (block.head + head) * state_floats, lines, layout.dv_padded);
    };
    const auto scales = [&](int head, const std::byte* of_first) -> const float* {
      if (Math::kCacheType != CacheType::int8) return nullptr;
      return reinterpret_cast<const float*>(of_first +
                                            static_cast<size_t>(head) * layout.scale_head_bytes);
    };
    // The first values have been fetched with the last keys.
    const std::byte* soon = block.values + (near ? 0 : v_head_bytes);
    for (int head = 0, line = 0; head < num_heads; ++head) {
      const State state = state_of(head);
      const float* k_scales = scales(head, block.k_scales);
      for (int row = 0, i = 0; row < a.num_rows; ++row) {
        const Visible lanes = visible(row);
        for (int g = 0; g < a.group; ++g, ++line, ++i) {
          fetch(soon);
          scratch.peaks[line] = state.peak[i];
          scratch.sums[line] = finish_scores(scratch.scores + line * kBlockTokens, a, k_scales,
                                             num_lane_blocks, lanes);
        }
      }
    }
    // `sums` holds the block's peaks; from here on the peak that the weights are relative to.
    for (int line = 0; line < num_heads * lines; line += kLanes) {
      const Vec before = load(scratch.peaks + line);
      const Vec peak = max(before, load(scratch.sums + line));
      const Vec base = finite_peak(peak);
      store(scratch.peaks + line, peak);
      store(scratch.sums + line, base);
      store(scratch.factors + line, exp2(sub(before, base)));
    }
    for (int head = 0, line = 0; head < num_heads; ++head) {
      const State state = state_of(head);
      const float* v_scales = scales(head, block.v_scales);
      for (int row = 0, i = 0; row < a.num_rows; ++row) {
        const Visible lanes = visible(row);
        for (int g = 0; g < a.group; ++g, ++line, ++i) {
          fetch(soon);
          const float sum = Math::weigh(scratch.scores + line * kBlockTokens, scratch.sums[line],
                                        v_scales, num_lane_blocks, lanes,
                                        weights + line * kWeightsStride);
          state.total[i] = state.total[i] * scratch.factors[line] + sum;
          state.peak[i] = scratch.peaks[line];
        }
      }
    }

    const auto stop_lane = static_cast<int>(block.stop_token - first);
    const int value_steps = stop_lane / Math::kStep;
    for (int head = 0; head < num_heads; ++head) {
      const std::byte* values = block.values + head * v_head_bytes;
      const std::byte* then = head + 1 < num_heads ? values + v_head_bytes : next.keys;
      auto* line_weights = weights + head * lines * kWeightsStride;
      float* factors = scratch.factors + head * lines;
      ValueTile<Math> tile{line_weights,
                           line_weights + kBlockTokens / Math::kStep * Math::kOperandsPerStep,
                           kWeightsStride,
                           values,
                           group_bytes,
                           value_steps,
                           {},
                           factors,
                           state_of(head).acc,
                           layout.dv_padded};
      const int columns = layout.dv_padded / kLanes;
      const std::byte* from = near ? values + v_head_bytes / 2 : then;
      multiply_values<Math>(tile, lines, columns,
                            {from, from + v_head_bytes, near ? kNearValueLines : kAllLines});
      if (const int rest = stop_lane % Math::kStep; rest != 0) {
        for (int line = 0; line < lines; ++line) factors[line] = 1.0f;
        tile.weights += value_steps * Math::kOperandsPerStep;
        tile.values =
            masked_group<Math>(values + value_steps * group_bytes, rest, layout, scratch.tail);
        tile.steps = 1;
        multiply_values<Math>(tile, lines, columns, {values, values, 0});
      }
    }
    block = next;
  }
}

/// A row's query vector as float32, padded with zeros to whole steps.
inline void widen_query(const AttendArgs& a, const std::byte* from, float* to) {
  const size_t item = item_bytes(a.dtype);
  const int dk = a.pages.layout->dk;
  int d = 0;
  for (; d + kLanes <= dk; d += kLanes) {
    store(to + d, load_as(a.dtype, from + static_cast<size_t>(d) * item));
  }
  if (d < dk) {
    std::byte rest[kLanes * sizeof(float)] = {};
    __builtin_memcpy(rest, from + static_cast<size_t>(d) * item,
                     static_cast<size_t>(dk - d) * item);
    float wide[kLanes];
    store(wide, load_as(a.dtype, rest));
    for (int i = 0; d + i < a.pages.layout->dk_padded; ++i) to[d + i] = wide[i];
  }
}

inline const std::byte* query(const AttendArgs& a, int head, int line) {
  return a.q + static_cast<size_t>(head) * a.q_head_bytes +
         static_cast<size_t>(line / a.group) * a.q_row_bytes +
         static_cast<size_t>(line % a.group) * static_cast<size_t>(a.pages.layout->dk) *
             item_bytes(a.dtype);
}

/// Queries and weights stay float32.
template <CacheType kType, int kMostLines, int kMostColumns>
struct PlainMath : FloatMath<kType, kMostLines> {
  static constexpr int kMaxColumns = kMostColumns;
  static constexpr int kItemBytes = static_cast<int>(item_bytes(kType));
  static constexpr int kOperandsPerStep = pack_tokens(kType);
  static constexpr int kRowExtra = 0;
  static constexpr int kNearLines = 0;
  static constexpr int kValueLines = 2;
  static constexpr int kValueColumns = kMostLines * kMostColumns / 2;

  static void pack_queries(const AttendArgs& a, int head, float* q) {
    const int dk = a.pages.layout->dk_padded;
    for (int line = 0; line < a.num_rows * a.group; ++line) {
      widen_query(a, query(a, head, line), q + static_cast<ptrdiff_t>(line) * dk);
    }
  }

  /// Scores -> weights relative to `peak`; returns their sum.
  static float weigh(const float* scores, float peak, const float* v_scales, int num_lane_blocks,
                     Visible visible, float* weights) {
    Vec sum = splat(0.0f);
    for (int b = 0; b < num_lane_blocks; ++b) {
      Vec w = exp2(sub(load(scores + b * kLanes), splat(peak)));
      sum = add(sum, w);
      if constexpr (kType == CacheType::int8) {
        Vec scale = load(v_scales + b * kLanes);
        if (!visible.all) {
          scale = keep(scale, clamp_lane(visible.lo - b * kLanes),
                       clamp_lane(visible.hi - b * kLanes), 0.0f);
        }
        w = mul(w, scale);
      }
      store(weights + b * kLanes, w);
    }
    return reduce_add(sum);
  }
};

}  // namespace
}  // namespace lamina
