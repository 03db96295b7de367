// Linears over packed weights. Included once per instruction set, after vec.h and with
//   LAMINA_DOT_BF16   1 where the vdpbf16ps instruction may be used
//   kStreamRows       rows of which each panel of weights is read once, at memory speed
//   kTileRows, kTilePanels   registers' worth of results where more rows share a panel
//
// A panel is a stream of steps of 64 bytes: one float input or two bfloat16 inputs of 16 outputs.
// The rows' inputs are copied into [step][row], so that a step reads consecutive memory.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#if LAMINA_DOT_BF16
#include <immintrin.h>
#endif

#include "dense/kernels.h"
#include "dense/vec.h"

namespace lamina::dense {
namespace {

constexpr int64_t kStepBytes = 64;
/// How far ahead of the sums weights are fetched from memory (where few rows pass over them) and
/// from the second level cache.
constexpr int64_t kPrefetchBytes = 4096;
constexpr int64_t kNearBytes = 1024;
/// Inputs of a block of rows, which stay in the second level cache while all panels pass by.
constexpr int64_t kBlockBytes = 384 << 10;

template <typename E>
struct Dot;

template <>
struct Dot<float> {
  using Input = float;
  static constexpr int kInputs = 1;
  using Weights = Vec;
  static LAMINA_INLINE Weights weights(const char* step) {
    return Type<float>::load(reinterpret_cast<const float*>(step));
  }
  static LAMINA_INLINE Vec add(Vec sum, const Weights& w, const Input& x) { return sum + w * x; }
  static LAMINA_INLINE Input input(const float* x, bool) { return *x; }
};

#if LAMINA_DOT_BF16

template <>
struct Dot<Bf16> {
  using Input = uint32_t;
  static constexpr int kInputs = 2;
  using Weights = __m512bh;
  static LAMINA_INLINE Weights weights(const char* step) {
    return (__m512bh)_mm512_loadu_si512(step);
  }
  static LAMINA_INLINE Vec add(Vec sum, const Weights& w, const Input& x) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, w, (__m512bh)_mm512_set1_epi32(x));
  }
  static LAMINA_INLINE Input input(const Bf16* x, bool has_odd) {
    return x[0].bits | (has_odd ? uint32_t{x[1].bits} << 16 : 0);
  }
};

#else

template <>
struct Dot<Bf16> {
  struct Input {
    float even;
    float odd;
  };
  static constexpr int kInputs = 2;
  struct Weights {
    Vec even;
    Vec odd;
  };
  static LAMINA_INLINE Weights weights(const char* step) {
    VecU pair;
    memcpy(&pair, step, sizeof pair);
    return {(Vec)(pair << 16), (Vec)(pair & 0xffff0000u)};
  }
  static LAMINA_INLINE Vec add(Vec sum, const Weights& w, const Input& x) {
    return sum + w.even * x.even + w.odd * x.odd;
  }
  static LAMINA_INLINE float widen(Bf16 x) {
    const uint32_t bits = uint32_t{x.bits} << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
  static LAMINA_INLINE Input input(const Bf16* x, bool has_odd) {
    return {widen(x[0]), has_odd ? widen(x[1]) : 0.0f};
  }
};

#endif

template <typename E>
int64_t num_steps(int64_t num_inputs) {
  return (num_inputs + Dot<E>::kInputs - 1) / Dot<E>::kInputs;
}

/// Inputs of `rows` rows from row `first` on, as [step][row].
template <typename E>
void pack_rows(const LinearJob& job, int64_t first, int64_t rows, typename Dot<E>::Input* packed) {
  constexpr int kInputs = Dot<E>::kInputs;
  const int64_t whole = job.num_inputs / kInputs;
  for (int64_t row = 0; row < rows; ++row) {
    const E* x = job.x.at<E>(first + row);
    for (int64_t step = 0; step < whole; ++step) {
      packed[step * rows + row] = Dot<E>::input(x + step * kInputs, true);
    }
    if (whole * kInputs < job.num_inputs) {
      packed[whole * rows + row] = Dot<E>::input(x + whole * kInputs, false);
    }
  }
}

/// Writes the results of up to 16 outputs of one row.
template <typename E>
LAMINA_INLINE void finish(const LinearJob& job, int64_t row, int64_t panel, Vec y) {
  const int64_t begin = panel * kPanel;
  const Piece piece{begin, std::min<int64_t>(kPanel, job.num_outputs - begin)};
  if (job.bias != nullptr) y += piece.load(job.bias);
  if (job.residual.data != nullptr) {
    y = Type<E>::rounded(y) + piece.load(job.residual.at<E>(row));
  }
  piece.store(job.out.at<E>(row), y);
}

/// What a tile fetches while it computes: the panels that come next, at an even pace over the tiles
/// that share the present ones, so that memory is busy all the time. Null: its own panel.
struct Ahead {
  const char* begin;
  int64_t step_bytes;
};

/// `kRows` rows times `kPanels` panels. With few results per step, several steps add up in
/// registers of their own, so that additions do not wait for each other.
template <typename E, int kRows, int kPanels>
void tile(const LinearJob& job, const typename Dot<E>::Input* x, int64_t row, int64_t panel,
          Ahead ahead) {
  constexpr int kSums = kRows * kPanels;
  constexpr int kUnroll = kSums >= 8 ? 1 : kSums >= 4 ? 2 : kSums >= 2 ? 4 : 8;
  const int64_t steps = num_steps<E>(job.num_inputs);
  const int64_t panel_bytes = steps * kStepBytes;
  const char* w = static_cast<const char*>(job.packed) + panel * panel_bytes;
  const char* fetch = ahead.begin;
  Vec sums[kUnroll][kRows][kPanels] = {};
  int64_t step = 0;
  for (; step + kUnroll <= steps; step += kUnroll) {
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) {
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) {
        if constexpr (kPanels == 1) {
          __builtin_prefetch(w + u * kStepBytes + kPrefetchBytes);
        } else {
          __builtin_prefetch(w + p * panel_bytes + u * kStepBytes + kNearBytes);
          __builtin_prefetch(fetch + p * ahead.step_bytes / kPanels, 0, 2);
        }
        const auto weights = Dot<E>::weights(w + p * panel_bytes + u * kStepBytes);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          sums[u][r][p] = Dot<E>::add(sums[u][r][p], weights, x[u * kRows + r]);
        }
      }
    }
    w += kUnroll * kStepBytes;
    fetch += kUnroll * ahead.step_bytes;
    x += kUnroll * kRows;
  }
  if constexpr (kUnroll > 1) {
    for (; step < steps; ++step, w += kStepBytes, x += kRows) {
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) {
        const auto weights = Dot<E>::weights(w + p * panel_bytes);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) sums[0][r][p] = Dot<E>::add(sums[0][r][p], weights, x[r]);
      }
    }
  }
  // The results leave their registers here: kept in them, they would crowd out the loop's.
  Vec totals[kRows][kPanels];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) {
      Vec total = sums[0][r][p];
#pragma GCC unroll 8
      for (int u = 1; u < kUnroll; ++u) total += sums[u][r][p];
      totals[r][p] = total;
    }
  }
  __asm__ volatile("" : "+m"(totals));
#pragma GCC unroll 1
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 1
    for (int p = 0; p < kPanels; ++p) finish<E>(job, row + r, panel + p, totals[r][p]);
  }
}

template <typename E>
using Tile = void (*)(const LinearJob&, const typename Dot<E>::Input*, int64_t, int64_t, Ahead);

/// tiles()[r - 1] computes r rows.
template <typename E, int kPanels, int... kRows>
constexpr std::array<Tile<E>, sizeof...(kRows)> tiles(std::integer_sequence<int, kRows...>) {
  return {tile<E, kRows + 1, kPanels>...};
}

template <typename E>
void linear(const LinearJob& job, int64_t row_begin, int64_t row_end, int64_t panel_begin,
            int64_t panel_end, void* scratch) {
  static constexpr auto narrow =
      tiles<E, 1>(std::make_integer_sequence<int, std::max(kStreamRows, kTileRows)>{});
  static constexpr auto wide = tiles<E, kTilePanels>(std::make_integer_sequence<int, kTileRows>{});
  using Input = typename Dot<E>::Input;
  Input* packed = static_cast<Input*>(scratch);
  const int64_t rows = row_end - row_begin;
  const int64_t steps = num_steps<E>(job.num_inputs);
  if (rows <= kStreamRows) {
    if (rows == 0) return;
    pack_rows<E>(job, row_begin, rows, packed);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      narrow[rows - 1](job, packed, row_begin, panel, {});
    }
    return;
  }
  const int64_t tile_bytes = kTileRows * steps * static_cast<int64_t>(sizeof(Input));
  const int64_t tiles_per_block = std::max<int64_t>(1, kBlockBytes / tile_bytes);
  const int64_t num_tiles = (rows + kTileRows - 1) / kTileRows;
  const auto first_row = [&](int64_t tile) { return rows * tile / num_tiles; };
  for (int64_t block = 0; block < num_tiles; block += tiles_per_block) {
    const int64_t block_end = std::min(num_tiles, block + tiles_per_block);
    const auto tile_of_block = [&](int64_t tile) {
      return packed + (first_row(tile) - first_row(block)) * steps;
    };
    for (int64_t tile = block; tile < block_end; ++tile) {
      pack_rows<E>(job, row_begin + first_row(tile), first_row(tile + 1) - first_row(tile),
                   tile_of_block(tile));
    }
    for (int64_t panel = panel_begin; panel < panel_end; panel += kTilePanels) {
      const auto& table = panel + kTilePanels <= panel_end ? wide.data() : narrow.data();
      const char* next = static_cast<const char*>(job.packed) +
                         (panel + kTilePanels) * steps * kStepBytes;
      const int64_t step_bytes = kTilePanels * kStepBytes / (block_end - block);
      for (int64_t tile = block; tile < block_end; ++tile) {
        const Ahead ahead{next + (tile - block) * steps * step_bytes, step_bytes};
        table[first_row(tile + 1) - first_row(tile) - 1](job, tile_of_block(tile),
                                                         row_begin + first_row(tile), panel, ahead);
      }
    }
  }
}

template <typename E>
size_t linear_scratch_bytes(int64_t num_inputs) {
  const size_t row = num_steps<E>(num_inputs) * sizeof(typename Dot<E>::Input);
  return std::max<size_t>(row * std::max(kStreamRows, kTileRows), kBlockBytes + row);
}

}  // namespace
}  // namespace lamina::dense
