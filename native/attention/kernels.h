// The computations on one KV head of one sequence, and the table that chooses their code.
//
// A *line* is one query head of one row: the G query heads of a KV head times the rows of a tile,
// line = row * G + head. Scores are kept in base 2: score2 = log2(e) * score.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/layout.h"
#include "core/isa.h"

namespace lamina {

constexpr int64_t kNoWindow = INT64_MAX / 2;

/// The online softmax of some lines. `acc` is float32 [lines][dv_padded], not yet divided by the
/// total; `peak` (base 2) and `total` are [lines].
struct State {
  float* acc;
  float* peak;
  float* total;

  static size_t num_floats(int lines, int dv_padded) {
    return static_cast<size_t>(lines) * static_cast<size_t>(dv_padded) +
           2 * static_cast<size_t>(round_up(lines, kLanes));
  }
  static State at(float* memory, int lines, int dv_padded) {
    float* peak = memory + static_cast<size_t>(lines) * static_cast<size_t>(dv_padded);
    return {memory, peak, peak + round_up(lines, kLanes)};
  }
};

/// Working memory of one thread. All parts are aligned to 64 bytes.
struct Scratch {
  std::byte* q;       // packed queries: 4 bytes per element
  float* scores;      // [lines][kBlockTokens]
  std::byte* weights; // [lines][kBlockTokens] in the form that the values' product takes
  float* factors;     // [lines]
  float* sums;        // [lines]
  float* peaks;       // [lines]
  std::byte* tail;    // one group of values
  float* state;       // for State::at

  /// `max_lines` of one head, `max_queries` of all heads that are attended to together.
  static size_t num_bytes(int max_lines, int max_queries);
  static Scratch at(std::byte* memory, int max_lines, int max_queries);
};

/// Where the pages of one layer and sequence are.
struct LayerPages {
  const PageLayout* layout;
  std::byte* base;  // page 0
  size_t page_stride;
  const int32_t* pages;  // of the sequence, in token order

  std::byte* page(int64_t page_index) const {
    return base + static_cast<size_t>(pages[page_index]) * page_stride;
  }
};

struct AttendArgs {
  LayerPages pages;
  int64_t begin, end;  // the share of the sequence's tokens, begin < end
  Dtype dtype;
  const std::byte* q;  // row r, head g at q + r * q_row_bytes + g * dk elements
  size_t q_row_bytes;
  size_t q_head_bytes;
  int num_rows, group;
  int first_head, num_heads;  // KV heads; q and state point to the first
  int64_t first_position;  // of row 0
  int64_t window;
  float scale2;    // score2 = scale2 * qk, or with softcap score2 = cap2 * tanh(scale2 * qk)
  float cap2;      // 0: no softcap
  State state;     // of the first head, continued; that of the next head follows in memory
  Scratch scratch;
};

struct WriteArgs {
  State state;
  int num_rows, group, dv, dv_padded;
  const float* sinks;  // [G], of the group's heads; null: none
  Dtype dtype;
  std::byte* out;  // row r, head g at out + r * out_row_bytes + g * dv elements
  size_t out_row_bytes;
  float* lse;  // row r, head g at lse[r * lse_row_stride + g]; may be null
  size_t lse_row_stride;
};

struct AppendArgs {
  LayerPages pages;
  int head;
  int64_t first_token, num_tokens;
  Dtype dtype;
  const std::byte* k;  // token t at k + t * k_row_bytes
  const std::byte* v;
  size_t k_row_bytes, v_row_bytes;
};

struct Kernels {
  /// Attend over tokens [begin, end), those that each row sees, and add them to the state.
  void (*attend)(const AttendArgs&);
  /// into += other, for `lines` lines.
  void (*merge)(const State& into, const State& other, int lines, int dv_padded);
  /// Add the sinks, divide, convert; where nothing was seen the output is zero and the LSE -inf.
  void (*write)(const WriteArgs&);
};

const Kernels& kernels_for(Isa isa, CacheType type);

/// Store tokens. Reads nothing of what is there.
using Append = void (*)(const AppendArgs&);
Append append_for(CacheType type);

/// Start with nothing seen.
void clear_state(const State& state, int lines, int dv_padded);

}  // namespace lamina
