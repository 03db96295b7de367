// The blocks of tokens that attention goes through. Included by kernel files; local to them.
#pragma once

#include "attention/common.h"

namespace lamina {
namespace {

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

}  // namespace
}  // namespace lamina
