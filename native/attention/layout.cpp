#include "attention/layout.h"

namespace lamina {

RunLayout::RunLayout(CacheType type, int head_dim_k, int head_dim_v, int page_tokens)
    : dk(head_dim_k), dv(head_dim_v), page_tokens(page_tokens) {
  constexpr int64_t kKeyPadding = 4, kLine = 64;
  const size_t item = item_bytes(type);
  const auto tokens = static_cast<size_t>(round_up(page_tokens, kLanes));
  dk_padded = static_cast<int>(round_up(dk, kKeyPadding));
  dv_padded = static_cast<int>(round_up(dv, kLanes));
  const auto pack = static_cast<size_t>(pack_tokens(type));
  key_tokens = tokens % kBlockTokens == 0 ? kBlockTokens : kLanes;
  k_step_bytes = static_cast<size_t>(key_tokens) * pack * item;
  key_block_bytes = static_cast<size_t>(dk_padded) / pack * k_step_bytes;
  k_column_bytes = key_tokens == kLanes ? key_block_bytes : kLanes * pack * item;
  v_group_bytes = static_cast<size_t>(pack_tokens(type) * dv_padded) * item;
  v_offset = tokens / static_cast<size_t>(key_tokens) * key_block_bytes;
  k_scales_offset = v_offset + tokens * static_cast<size_t>(dv_padded) * item;
  const size_t scales_bytes = type == CacheType::int8 ? tokens * sizeof(float) : 0;
  v_scales_offset = k_scales_offset + scales_bytes;
  bytes = static_cast<size_t>(
      round_up(static_cast<int64_t>(v_scales_offset + scales_bytes), kLine));
}

}  // namespace lamina
