// How keys and values lie in memory. Python asks here too (`bytes_per_page`).
//
// A page of a layer holds all KV heads. Its tokens are cut into *units* of 64 (or it is one unit, if
// its tokens are no multiple of 64); units lie one after the other and consist of
//
//   keys      [H][U / W][Dk / P][W][P]   W tokens side by side: one load serves 16 scores
//   values    [H][U / P][Dv][P]          P tokens side by side: one load adds P tokens to 16 outputs
//   scales    keys [H][U], values [H][U] float32, int8 caches only
//
// which is the order in which a decode step reads them, all heads together. P is what the machine's
// dot products take at once: 2 for bfloat16, 4 for int8, else 1. U is rounded up to 16 tokens; W is
// U if that is 64, else 16. Dk and Dv are padded to 4 and 16; padding of keys is zero. Keys of an int8
// cache are stored plus 128 (unsigned), as the dot product instruction wants them.
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

/// The layout of one layer's part of a page.
struct PageLayout {
  PageLayout(CacheType type, int num_heads, int head_dim_k, int head_dim_v, int page_tokens);

  int dk, dv;                // sizes of k and v vectors
  int dk_padded, dv_padded;  // as stored
  int page_tokens, unit_tokens;
  size_t k_step_bytes;    // P elements of W tokens
  size_t k_column_bytes;  // between 16 tokens and the next 16
  size_t v_group_bytes;   // P tokens
  size_t k_head_bytes, v_head_bytes, scale_head_bytes;  // from head to head within a unit
  size_t v_offset, k_scales_offset, v_scales_offset;    // within a unit, of its first head
  size_t unit_bytes;                                    // a multiple of 64
  size_t bytes;                                         // of the page

  size_t unit_offset(int slot) const { return index(slot / unit_tokens) * unit_bytes; }
  /// Of the first P elements of the key in a slot.
  size_t key_offset(int head, int slot) const {
    const int in_unit = slot % unit_tokens;
    return unit_offset(slot) + index(head) * k_head_bytes +
           index(in_unit / kLanes) * k_column_bytes + index(in_unit % kLanes) * k_token_bytes;
  }
  /// Of the group of P tokens that a slot belongs to.
  size_t value_group_offset(int head, int slot) const {
    return unit_offset(slot) + v_offset + index(head) * v_head_bytes +
           index(slot % unit_tokens / pack) * v_group_bytes;
  }
  size_t k_scale_offset(int head, int slot) const {
    return unit_offset(slot) + k_scales_offset + index(head) * scale_head_bytes +
           index(slot % unit_tokens) * sizeof(float);
  }
  size_t v_scale_offset(int head, int slot) const {
    return k_scale_offset(head, slot) + (v_scales_offset - k_scales_offset);
  }

 private:
  static size_t index(int value) { return static_cast<size_t>(value); }

  int pack;
  size_t k_token_bytes;  // P elements
};

}  // namespace lamina
