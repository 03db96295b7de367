// Attention of a tile of lines over paged tokens, with an online softmax per block of tokens.
// Included by kernel files after their `Vec`; local to them.
#pragma once

#include "attention/tile.h"

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

/// Lines of several heads are worked on together, up to this many: the keys of all heads, then their
/// values are read from front to back, and no softmax waits for itself.
constexpr int kLinesTogether = 64;

/// Up to this many lines of a head, reading memory takes longer than computing.
constexpr int kFewLines = 8;

/// Up to 64 tokens of one page, for `head` and the heads after it that are worked on together.
struct Block {
  int head;
  const std::byte* keys;
  const std::byte* values;
  const std::byte* k_scales;
  const std::byte* v_scales;
  int64_t first_token;  // of lane 0; may lie before the range
  int first_slot;       // of lane 0 in its page
  int num_lane_blocks;  // of 16 tokens
  int64_t stop_token;   // lanes from here on hold no token of the range
};

/// Blocks in the order in which they lie in memory.
class BlockWalk {
 public:
  BlockWalk(const AttendArgs& a, int heads_together, int64_t begin, int64_t end)
      : pages_(a.pages),
        layout_(*a.pages.layout),
        first_head_(a.first_head),
        num_heads_(a.num_heads),
        heads_together_(heads_together),
        token_(begin),
        end_(end) {
    page_ = begin / layout_.page_tokens;
    slot_ = static_cast<int>(begin % layout_.page_tokens);
  }

  bool is_done() const { return token_ >= end_; }

  Block next() {
    Block block;
    block.head = head_;
    const int skipped = slot_ % kLanes;
    block.first_slot = slot_ - skipped;
    block.first_token = token_ - skipped;
    int64_t stop_slot =
        smaller(layout_.page_tokens, (block.first_slot / kBlockTokens + 1) * kBlockTokens);
    stop_slot = smaller(stop_slot, slot_ + (end_ - token_));
    block.stop_token = block.first_token + (stop_slot - block.first_slot);
    block.num_lane_blocks =
        static_cast<int>((stop_slot - block.first_slot + kLanes - 1) / kLanes);
    const std::byte* page = pages_.page(page_);
    const int head = first_head_ + head_;
    block.keys = page + layout_.key_offset(head, block.first_slot);
    block.values = page + layout_.value_group_offset(head, block.first_slot);
    block.k_scales = page + layout_.k_scale_offset(head, block.first_slot);
    block.v_scales = page + layout_.v_scale_offset(head, block.first_slot);
    head_ += heads_together_;
    if (head_ < num_heads_) return block;
    head_ = 0;
    token_ = block.stop_token;
    slot_ = static_cast<int>(stop_slot);
    if (slot_ == layout_.page_tokens) {
      slot_ = 0;
      ++page_;
    }
    return block;
  }

 private:
  const LayerPages& pages_;
  const PageLayout& layout_;
  int first_head_, num_heads_, heads_together_;
  int64_t token_, end_, page_;
  int head_ = 0;
  int slot_;
};

/// How many of the lines that are left the next tile takes.
template <typename Math>
int lines_of_tile(int left, bool is_first, bool few) {
  // The first of few lines wait for memory; the fewer they are, the less is computed meanwhile.
  if (is_first && few) return left < 2 ? left : 2;
  const int tiles = (left + Math::kMaxLines - 1) / Math::kMaxLines;
  return (left + tiles - 1) / tiles;
}

template <typename Math, int C>
void score_lines(ScoreTile<Math> tile, int lines, const std::byte* next_end) {
  const bool few = lines <= kFewLines;
  for (int left = lines; left > 0;) {
    const bool is_first = left == lines;
    const int take = lines_of_tile<Math>(left, is_first, few);
    const bool ahead = !is_first && tile.next < next_end;
    unroll<Math::kMaxLines>([&](auto r) __attribute__((always_inline)) {
      constexpr int kLines = r + 1;
      if (take != kLines) return;
      if (ahead) {
        score_tile<Math, kLines, C, Prefetch::next>(tile);
        tile.next += tile.steps * lines_ahead(kLines, C) * kCacheLine;
      } else if (kLines == 1 && is_first) {
        score_tile<Math, kLines, C, kLines == 1 ? Prefetch::along : Prefetch::none>(tile);
      } else {
        score_tile<Math, kLines, C, Prefetch::none>(tile);
      }
    });
    tile.q += take * tile.q_stride;
    tile.scores += take * kBlockTokens;
    left -= take;
  }
}

template <typename Math>
void multiply_keys(ScoreTile<Math> tile, int lines, int num_lane_blocks,
                   const std::byte* next_end) {
  constexpr int kColumns = Math::kMaxColumns < 4 ? Math::kMaxColumns : 4;
  while (num_lane_blocks > 0) {
    int take = 1;
    if (num_lane_blocks >= 4 && kColumns >= 4) {
      take = 4;
      score_lines<Math, kColumns>(tile, lines, next_end);
    } else if (num_lane_blocks >= 2 && kColumns >= 2) {
      take = 2;
      score_lines<Math, (kColumns < 2 ? 1 : 2)>(tile, lines, next_end);
    } else {
      score_lines<Math, 1>(tile, lines, next_end);
    }
    tile.keys += take * tile.column_bytes;
    tile.scores += take * kLanes;
    num_lane_blocks -= take;
  }
}

template <typename Math, int R, Prefetch kPrefetch>
void value_columns(ValueTile<Math>& tile, int columns) {
  constexpr ptrdiff_t kColumnBytes = kLanes * Math::kStep * Math::kItemBytes;
  // As many columns as the registers hold, in powers of two.
  constexpr int kFit = Math::kMaxLines * Math::kMaxColumns / R;
  constexpr int kMost = kFit >= 8 ? 8 : kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
  ValueTile<Math> part = tile;
  const auto run = [&]<int C>(std::integral_constant<int, C>) __attribute__((always_inline)) {
    value_tile<Math, R, C, kPrefetch>(part);
    part.values += C * kColumnBytes;
    if (part.tail != nullptr) part.tail += C * kColumnBytes;
    part.acc += C * kLanes;
    part.next += part.steps * lines_ahead(R, C) * kCacheLine;
    columns -= C;
  };
  while (columns >= kMost) run(std::integral_constant<int, kMost>{});
  if (kMost > 4 && columns >= 4) run(std::integral_constant<int, kMost < 4 ? kMost : 4>{});
  if (kMost > 2 && columns >= 2) run(std::integral_constant<int, kMost < 2 ? kMost : 2>{});
  if (kMost > 1 && columns >= 1) run(std::integral_constant<int, 1>{});
  tile.next = part.next;
}

template <typename Math>
void multiply_values(ValueTile<Math> tile, int lines, int columns, const std::byte* next_end) {
  const bool few = lines <= kFewLines;
  for (int left = lines; left > 0;) {
    const bool is_first = left == lines;
    const int take = lines_of_tile<Math>(left, is_first, few);
    const bool ahead = !is_first && tile.next < next_end;
    unroll<Math::kMaxLines>([&](auto r) __attribute__((always_inline)) {
      constexpr int kLines = r + 1;
      if (take != kLines) return;
      if (ahead) {
        value_columns<Math, kLines, Prefetch::next>(tile, columns);
      } else if (kLines == 1 && is_first) {
        value_columns<Math, kLines, kLines == 1 ? Prefetch::along : Prefetch::none>(tile, columns);
      } else {
        value_columns<Math, kLines, Prefetch::none>(tile, columns);
      }
    });
    tile.weights += take * tile.weights_stride;
    tile.factors += take;
    tile.acc += take * tile.acc_stride;
    left -= take;
  }
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
      multiply_keys<Math>(
          {q + (block.head + head) * lines * q_stride, q_stride, keys, key_step_bytes,
           static_cast<ptrdiff_t>(layout.k_column_bytes), key_steps,
           then,
           scratch.scores + head * lines * kBlockTokens},
          lines, num_lane_blocks, then + layout.k_head_bytes);
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
    for (int head = 0, line = 0; head < num_heads; ++head) {
      const State state = state_of(head);
      const float* k_scales = scales(head, block.k_scales);
      for (int row = 0, i = 0; row < a.num_rows; ++row) {
        const Visible lanes = visible(row);
        for (int g = 0; g < a.group; ++g, ++line, ++i) {
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
      ValueTile<Math> tile{weights + head * lines * kWeightsStride,
                           kWeightsStride,
                           values,
                           group_bytes,
                           value_steps,
                           nullptr,
                           then,
                           scratch.factors + head * lines,
                           state_of(head).acc,
                           layout.dv_padded};
      if (const int rest = stop_lane % Math::kStep; rest != 0) {
        tile.tail =
            masked_group<Math>(values + value_steps * group_bytes, rest, layout, scratch.tail);
      }
      multiply_values<Math>(tile, lines, layout.dv_padded / kLanes, then + layout.v_head_bytes);
    }
    block = next;
  }
}

inline void merge(const State& into, const State& other, int lines, int dv_padded) {
  for (int line = 0; line < lines; ++line) {
    const Vec a = splat(into.peak[line]), b = splat(other.peak[line]);
    const Vec peak = max(a, b);
    const Vec base = finite_peak(peak);
    const Vec mine = exp2(sub(a, base)), theirs = exp2(sub(b, base));
    float* acc = into.acc + static_cast<ptrdiff_t>(line) * dv_padded;
    const float* more = other.acc + static_cast<ptrdiff_t>(line) * dv_padded;
    for (int d = 0; d < dv_padded; d += kLanes) {
      store(acc + d, fma(load(acc + d), mine, mul(load(more + d), theirs)));
    }
    float value[kLanes];
    store(value, fma(splat(into.total[line]), mine, mul(splat(other.total[line]), theirs)));
    into.total[line] = value[0];
    store(value, peak);
    into.peak[line] = value[0];
  }
}

inline void write(const WriteArgs& a) {
  const size_t item = item_bytes(a.dtype);
  for (int row = 0; row < a.num_rows; ++row) {
    for (int g = 0; g < a.group; ++g) {
      const int line = row * a.group + g;
      Vec peak = splat(a.state.peak[line]);
      Vec total = splat(a.state.total[line]);
      Vec factor = splat(1.0f);
      if (a.sinks != nullptr) {
        const Vec sink = splat(a.sinks[g] * kLog2E);
        const Vec before = peak;
        peak = max(before, sink);
        factor = exp2(sub(before, peak));
        total = fma(total, factor, exp2(sub(sink, peak)));
      }
      const bool empty = a.state.total[line] == 0.0f && a.sinks == nullptr;
      factor = empty ? splat(0.0f) : div(factor, total);
      const float* acc = a.state.acc + static_cast<ptrdiff_t>(line) * a.dv_padded;
      std::byte* out = a.out + static_cast<size_t>(row) * a.out_row_bytes +
                       static_cast<size_t>(g) * static_cast<size_t>(a.dv) * item;
      int d = 0;
      for (; d + kLanes <= a.dv; d += kLanes) {
        store_as(a.dtype, out + static_cast<size_t>(d) * item, mul(load(acc + d), factor));
      }
      if (d < a.dv) {
        std::byte rest[kLanes * sizeof(float)];
        store_as(a.dtype, rest, mul(load(acc + d), factor));
        __builtin_memcpy(out + static_cast<size_t>(d) * item, rest,
                         static_cast<size_t>(a.dv - d) * item);
      }
      if (a.lse != nullptr) {
        float values[2][kLanes];
        store(values[0], peak);
        store(values[1], total);
        a.lse[static_cast<size_t>(row) * a.lse_row_stride + static_cast<size_t>(g)] =
            empty ? -kInfinity : values[0][0] * kLn2 + __builtin_logf(values[1][0]);
      }
    }
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
