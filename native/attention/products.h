// Products of many lines with a block of keys or values, cut into tiles. Included by kernel files after
// their `Vec`; local to them.
#pragma once

#include "attention/tile.h"

namespace lamina {
namespace {

/// Up to this many lines of a head, reading memory takes longer than computing.
constexpr int kFewLines = 8;

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

}  // namespace
}  // namespace lamina
