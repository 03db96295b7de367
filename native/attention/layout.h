// How keys and values lie in memory. Python asks here too (`bytes_per_page`).
//
// A *run* holds the tokens of one page for one KV head of one layer, contiguously:
//
//   keys      [T / W][Dk / P][W][P]     W tokens side by side: one load serves 16 scores
//   values    [T / P][Dv][P]            P tokens side by side: one load adds P tokens to 16 outputs
//   scales    keys [T], values [T]      float32, int8 caches only
//
// P is what the machine's dot products take at once: 2 for bfloat16, 4 for int8, else 1. T is the
// page's tokens rounded up to 16, W is 64 where that divides T (then a block of 64 tokens is read front
// to back, as the machine's prefetchers like it), else 16. Dk and Dv are padded to 4 and 16; padding of keys is zero. Keys of
// an int8 cache are stored plus 128 (unsigned), as the dot product instruction wants them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lamina {

/// Of q, k, v and the output.
enum class Dtype : int { float32, float16, bfloat16 };

/// Of the cache: the model's, or int8 with scales.
enum class CacheType : int { float32, float16, bfloat16, int8 };

constexpr size_t item_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }
constexpr size_t item_bytes(CacheType type) {
  return type == CacheType::float32 ? 4 : type == CacheType::int8 ? 1 : 2;
}
constexpr int pack_tokens(CacheType type) {
  return type == CacheType::bfloat16 ? 2 : type == CacheType::int8 ? 4 : 1;
}

constexpr int kLanes = 16;

/// Tokens that the kernels take at once: at most this many of one page.
constexpr int kBlockTokens = 64;

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

/// The layout of a run.
struct RunLayout {
  RunLayout(CacheType type, int head_dim_k, int head_dim_v, int page_tokens);

  int dk, dv;                // sizes of k and v vectors
  int dk_padded, dv_padded;  // as stored
  int page_tokens;
  int key_tokens;         // W
  size_t k_step_bytes;    // P elements of W tokens
  size_t k_column_bytes;  // between 16 tokens and the next 16 within a block of 64 tokens
  size_t v_group_bytes;  // of P tokens
  size_t v_offset, k_scales_offset, v_scales_offset;
  size_t bytes;  // of the run, a multiple of 64

  /// Of the first P elements of the key in a slot.
  size_t key_offset(int slot) const {
    const auto index = static_cast<size_t>(slot), width = static_cast<size_t>(key_tokens);
    return index / width * key_block_bytes + index % width * (k_step_bytes / width);
  }

 private:
  size_t key_block_bytes;  // of W tokens
};

}  // namespace lamina
