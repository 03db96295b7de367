// Products of many lines with a block of keys or values, cut into tiles. Included by kernel files after
// their `Vec`; local to them.
#pragma once

#include "attention/tile.h"

namespace lamina {
namespace {

/// How many of the lines that are left the next tile takes: tiles are about equal.
template <typename Math>
int lines_of_tile(int left) {
  const int tiles = (left + Math::kMaxLines - 1) / Math::kMaxLines;
  return (left + tiles - 1) / tiles;
}

/// Fetches all of `bytes` from `next` on within `steps` steps.
inline Ahead spread(const std::byte* next, ptrdiff_t bytes, int steps) {
  if (bytes <= 0 || steps == 0) return {next, 0, 0};
  const ptrdiff_t lines = (bytes + kCacheLine * steps - 1) / (kCacheLine * steps);
  return {next, static_cast<int>(lines), lines * kCacheLine};
}

/// Fetches [next, end), while tiles are computed one after the other.
struct Fetches {
  const std::byte* next;
  const std::byte* end;
  int most_lines;  // of a step; of the rest the machine guesses that it is needed

  /// The next `part` / `whole` of it, within `steps` steps.
  Ahead take(int part, int whole, int steps) {
    Ahead ahead = spread(next, (end - next) * part / whole, steps);
    next += steps * ahead.step_bytes;
    ahead.lines = ahead.lines < most_lines ? ahead.lines : most_lines;
    return ahead;
  }
  /// The same for several tiles.
  Fetches split(int part, int whole) {
    const std::byte* begin = next;
    next += (end - next) * part / whole;
    return {begin, next, most_lines};
  }
};

template <typename Math, int C>
void score_lines(ScoreTile<Math> tile, int lines, Fetches fetches) {
  for (int left = lines; left > 0;) {
    const int take = lines_of_tile<Math>(left);
    tile.ahead = fetches.take(take, left, tile.steps);
    unroll<Math::kMaxLines>([&](auto r) __attribute__((always_inline)) {
      if (take == r + 1) score_tile<Math, r + 1, C>(tile);
    });
    tile.q += take * tile.q_stride;
    tile.scores += take * kBlockTokens;
    left -= take;
  }
}

template <typename Math>
void multiply_keys(ScoreTile<Math> tile, int lines, int num_lane_blocks, Fetches fetches) {
  constexpr int kColumns = Math::kMaxColumns < 4 ? Math::kMaxColumns : 4;
  while (num_lane_blocks > 0) {
    const int take = num_lane_blocks >= kColumns ? kColumns : num_lane_blocks >= 2 ? 2 : 1;
    const Fetches part = fetches.split(take, num_lane_blocks);
    if (take == kColumns) {
      score_lines<Math, kColumns>(tile, lines, part);
    } else if (take == 2) {
      score_lines<Math, (kColumns < 2 ? 1 : 2)>(tile, lines, part);
    } else {
      score_lines<Math, 1>(tile, lines, part);
    }
    tile.keys += take * tile.column_bytes;
    tile.scores += take * kLanes;
    num_lane_blocks -= take;
  }
}

template <typename Math, int R>
void value_columns(ValueTile<Math> tile, int columns, Fetches fetches) {
  constexpr ptrdiff_t kColumnBytes = kLanes * Math::kStep * Math::kItemBytes;
  // As many columns as the registers hold, in powers of two: up to 8, values are read in order.
  constexpr int kFit = Math::kValueLines * Math::kValueColumns / R;
  constexpr int kMost = kFit >= 8 ? 8 : kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
  const auto run = [&]<int C>(std::integral_constant<int, C>) __attribute__((always_inline)) {
    tile.ahead = fetches.take(C, columns, tile.steps);
    value_tile<Math, R, C>(tile);
    tile.values += C * kColumnBytes;
    tile.acc += C * kLanes;
    columns -= C;
  };
  while (columns >= kMost) run(std::integral_constant<int, kMost>{});
  if (kMost > 4 && columns >= 4) run(std::integral_constant<int, kMost < 4 ? kMost : 4>{});
  if (kMost > 2 && columns >= 2) run(std::integral_constant<int, kMost < 2 ? kMost : 2>{});
  if (kMost > 1 && columns >= 1) run(std::integral_constant<int, 1>{});
}

template <typename Math>
void multiply_values(ValueTile<Math> tile, int lines, int columns, Fetches fetches) {
  for (int left = lines; left > 0;) {
    const int take = left < Math::kValueLines ? left : Math::kValueLines;
    const Fetches part = fetches.split(take, left);
    unroll<Math::kValueLines>([&](auto r) __attribute__((always_inline)) {
      if (take == r + 1) value_columns<Math, r + 1>(tile, columns, part);
    });
    tile.weights += take * tile.weights_stride;
    tile.row_ends += take * tile.weights_stride;
    tile.factors += take;
    tile.acc += take * tile.acc_stride;
    left -= take;
  }
}

}  // namespace
}  // namespace lamina
