#include "attention/layout.h"

namespace lamina {

PageLayout::PageLayout(CacheType type, int num_heads, int head_dim_k, int head_dim_v,
                       int page_tokens)
    : dk(head_dim_k), dv(head_dim_v), page_tokens(page_tokens), pack(pack_tokens(type)) {
  constexpr int64_t kKeyPadding = 4, kLine = 64;
  const size_t item = item_bytes(type), heads = index(num_heads);
  dk_padded = static_cast<int>(round_up(dk, kKeyPadding));
  dv_padded = static_cast<int>(round_up(dv, kLanes));
  unit_tokens = page_tokens % kBlockTokens == 0 ? kBlockTokens
                                                : static_cast<int>(round_up(page_tokens, kLanes));
  const bool is_wide = unit_tokens == kBlockTokens;
  k_token_bytes = index(pack) * item;
  k_step_bytes = index(is_wide ? kBlockTokens : kLanes) * k_token_bytes;
  k_head_bytes = index(unit_tokens) * index(dk_padded) * item;
  k_column_bytes = is_wide ? kLanes * k_token_bytes : index(kLanes) * index(dk_padded) * item;
  v_group_bytes = index(pack) * index(dv_padded) * item;
  v_head_bytes = index(unit_tokens) * index(dv_padded) * item;
  scale_head_bytes = type == CacheType::int8 ? index(unit_tokens) * sizeof(float) : 0;
  v_offset = heads * k_head_bytes;
  k_scales_offset = v_offset + heads * v_head_bytes;
  v_scales_offset = k_scales_offset + heads * scale_head_bytes;
  unit_bytes = static_cast<size_t>(
      round_up(static_cast<int64_t>(v_scales_offset + heads * scale_head_bytes), kLine));
  bytes = index((page_tokens + unit_tokens - 1) / unit_tokens) * unit_bytes;
}

}  // namespace lamina
