// Storing tokens: the write side of layout.h.
#include <cstring>

#include "attention/kernels.h"
#include "attention/vec_portable.h"

namespace lamina {
namespace {

/// Where a token of the head goes.
struct Slot {
  std::byte* key;     // its first P elements; the next ones follow every `key_step` bytes
  std::byte* value;   // its first element; the next ones follow every `value_step` bytes
  float* k_scale;     // int8 only
  float* v_scale;
};

Slot slot_of(const AppendArgs& a, int64_t token, CacheType type) {
  const PageLayout& layout = *a.pages.layout;
  const auto slot = static_cast<int>(token % layout.page_tokens);
  const auto in_group = static_cast<size_t>(slot % pack_tokens(type)) * item_bytes(type);
  std::byte* page = a.pages.page(token / layout.page_tokens);
  return {page + layout.key_offset(a.head, slot),
          page + layout.value_group_offset(a.head, slot) + in_group,
          reinterpret_cast<float*>(page + layout.k_scale_offset(a.head, slot)),
          reinterpret_cast<float*>(page + layout.v_scale_offset(a.head, slot))};
}

/// Bit patterns are stored as they come.
template <typename Word, int kPack>
void append_plain(const AppendArgs& a) {
  constexpr auto kType = sizeof(Word) == 4   ? CacheType::float32
                         : kPack == 2        ? CacheType::bfloat16
                                             : CacheType::float16;
  constexpr size_t kValueStep = kPack * sizeof(Word);
  const PageLayout& layout = *a.pages.layout;
  const size_t key_step = layout.k_step_bytes;
  for (int64_t t = 0; t < a.num_tokens; ++t) {
    const Slot slot = slot_of(a, a.first_token + t, kType);
    const std::byte* k = a.k + static_cast<size_t>(t) * a.k_row_bytes;
    const std::byte* v = a.v + static_cast<size_t>(t) * a.v_row_bytes;
    const int whole = layout.dk / kPack;
    for (int step = 0; step < whole; ++step) {
      std::memcpy(slot.key + static_cast<size_t>(step) * key_step,
                  k + static_cast<size_t>(step) * kValueStep, kValueStep);
    }
    for (int d = whole * kPack; d < layout.dk_padded; ++d) {
      const Word word = d < layout.dk ? element<Word>(k, d) : Word{0};
      put_element(slot.key + static_cast<size_t>(d / kPack) * key_step, d % kPack, word);
    }
    for (int d = 0; d < layout.dv_padded; ++d) {
      const Word word = d < layout.dv ? element<Word>(v, d) : Word{0};
      std::memcpy(slot.value + static_cast<size_t>(d) * kValueStep, &word, sizeof word);
    }
  }
}

/// n elements as float32, then zeros up to `padded`; returns the largest magnitude.
float widen(Dtype dtype, const std::byte* from, int n, int padded, float* to) {
  float peak = 0.0f;
  for (int i = 0; i < padded; ++i) {
    float value = 0.0f;
    if (i < n) {
      value = dtype == Dtype::float32   ? element<float>(from, i)
              : dtype == Dtype::float16 ? static_cast<float>(element<_Float16>(from, i))
                                        : widen_bf16(element<uint16_t>(from, i));
    }
    to[i] = value;
    const float magnitude = value < 0.0f ? -value : value;
    // A NaN becomes the peak and stays it, hence the scale: it must not be stored as a number.
    peak = magnitude <= peak || peak != peak ? peak : magnitude;
  }
  return peak;
}

int quantise(float value, float inverse) {
  const float scaled = value * inverse;
  if (!(scaled > -127.5f && scaled < 127.5f)) return 0;
  return static_cast<int>((scaled + 12582912.0f) - 12582912.0f);
}

void append_int8(const AppendArgs& a) {
  constexpr int kPack = 4;
  constexpr int kMaxHeadDim = 256;
  const PageLayout& layout = *a.pages.layout;
  const size_t key_step = layout.k_step_bytes;
  float wide[kMaxHeadDim];
  for (int64_t t = 0; t < a.num_tokens; ++t) {
    const Slot slot = slot_of(a, a.first_token + t, CacheType::int8);
    const float k_peak = widen(a.dtype, a.k + static_cast<size_t>(t) * a.k_row_bytes, layout.dk,
                               layout.dk_padded, wide);
    *slot.k_scale = k_peak / 127.0f;
    const float k_inverse = k_peak > 0.0f ? 127.0f / k_peak : 0.0f;
    for (int d = 0; d < layout.dk_padded; ++d) {
      slot.key[static_cast<size_t>(d / kPack) * key_step + static_cast<size_t>(d % kPack)] =
          static_cast<std::byte>(quantise(wide[d], k_inverse) + 128);
    }
    const float v_peak = widen(a.dtype, a.v + static_cast<size_t>(t) * a.v_row_bytes, layout.dv,
                               layout.dv_padded, wide);
    *slot.v_scale = v_peak / 127.0f;
    const float v_inverse = v_peak > 0.0f ? 127.0f / v_peak : 0.0f;
    for (int d = 0; d < layout.dv_padded; ++d) {
      slot.value[static_cast<size_t>(d) * kPack] =
          static_cast<std::byte>(quantise(wide[d], v_inverse));
    }
  }
}

}  // namespace

Append append_for(CacheType type) {
  switch (type) {
    case CacheType::float32: return &append_plain<uint32_t, 1>;
    case CacheType::float16: return &append_plain<uint16_t, 1>;
    case CacheType::bfloat16: return &append_plain<uint16_t, 2>;
    case CacheType::int8: return &append_int8;
  }
  __builtin_unreachable();
}

}  // namespace lamina
