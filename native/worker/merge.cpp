#include "worker/merge.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace lamina {

namespace {

constexpr float kEmpty = -std::numeric_limits<float>::infinity();

/// Rounds to nearest even.
uint16_t to_bfloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void write_head(const float* sums, float factor, int64_t size, Dtype dtype, std::byte* out) {
  switch (dtype) {
    case Dtype::float32: {
      auto* to = reinterpret_cast<float*>(out);
      for (int64_t i = 0; i < size; ++i) to[i] = sums[i] * factor;
      return;
    }
    case Dtype::float16: {
      auto* to = reinterpret_cast<_Float16*>(out);
      for (int64_t i = 0; i < size; ++i) to[i] = static_cast<_Float16>(sums[i] * factor);
      return;
    }
    case Dtype::bfloat16: {
      auto* to = reinterpret_cast<uint16_t*>(out);
      for (int64_t i = 0; i < size; ++i) to[i] = to_bfloat16(sums[i] * factor);
      return;
    }
  }
}

}  // namespace

ShareMerger::ShareMerger(std::vector<LayerUnit> layers, int64_t num_units, Dtype dtype,
                         int num_micro_batches)
    : layers_(std::move(layers)),
      num_units_(num_units),
      dtype_(dtype),
      steps_(static_cast<size_t>(num_micro_batches)) {}

void ShareMerger::begin(int micro_batch, int64_t num_rows, std::vector<ExecutorEnd*> ends) {
  Step& step = steps_.at(micro_batch);
  step = {std::move(ends), {}, num_rows, 0};
  std::vector<char> is_touched(static_cast<size_t>(num_rows * num_units_));
  for (const ExecutorEnd* end : step.ends) {
    for (const Piece& run : end->attending(micro_batch).runs()) {
      for (int64_t row = run.row; row < run.row + run.num_rows; ++row) {
        const auto first = is_touched.begin() + row * num_units_ + run.unit;
        std::fill(first, first + run.num_units, 1);
      }
    }
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    const char* units = is_touched.data() + row * num_units_;
    for (int64_t unit = 0, stop; unit < num_units_; unit = stop) {
      stop = unit + 1;
      while (stop < num_units_ && units[stop] == units[unit]) ++stop;
      if (units[unit] != 0) step.touched.push_back({row, 1, unit, stop - unit});
    }
  }
  size_t num_heads = 0, num_values = 0;
  for (const LayerUnit& unit : layers_) {
    const auto heads = static_cast<size_t>(num_rows * num_units_ * unit.num_query_heads);
    num_heads = std::max(num_heads, heads);
    num_values = std::max(num_values, heads * static_cast<size_t>(unit.head_dim_v));
  }
  if (sums_.size() < num_values) sums_.resize(num_values);
  if (peaks_.size() < num_heads) {
    peaks_.resize(num_heads);
    totals_.resize(num_heads);
  }
}

void ShareMerger::collect(int micro_batch, int layer, uint64_t number, std::byte* out,
                          double deadline) {
  Step& step = steps_[micro_batch];
  const LayerUnit& unit = layers_[layer];
  if (step.num_collected == 0) {
    std::fill_n(peaks_.begin(), step.num_rows * num_units_ * unit.num_query_heads, kEmpty);
  }
  for (; step.num_collected < step.ends.size(); ++step.num_collected) {
    ExecutorEnd& end = *step.ends[step.num_collected];
    add(end.attending(micro_batch), unit, end.wait_partial(micro_batch, layer, number, deadline));
  }
  step.num_collected = 0;
  write(step, unit, out);
}

void ShareMerger::add(const Pieces& pieces, const LayerUnit& unit, const PartialOutput& part) {
  const int64_t size = unit.head_dim_v;
  const float* out = part.out;
  const float* lse = part.lse;
  for (const Piece& run : pieces.runs()) {
    for (int64_t row = run.row; row < run.row + run.num_rows; ++row) {
      const int64_t first = (row * num_units_ + run.unit) * unit.num_query_heads;
      const int64_t last = first + run.num_units * unit.num_query_heads;
      for (int64_t head = first; head < last; ++head, out += size, ++lse) {
        if (*lse == kEmpty) continue;
        float* sums = sums_.data() + head * size;
        float& peak = peaks_[head];
        if (peak == kEmpty) {
          std::copy_n(out, size, sums);
          peak = *lse;
          totals_[head] = 1.0f;
        } else if (*lse <= peak) {
          const float weight = std::exp(*lse - peak);
          for (int64_t i = 0; i < size; ++i) sums[i] += weight * out[i];
          totals_[head] += weight;
        } else {
          const float weight = std::exp(peak - *lse);
          for (int64_t i = 0; i < size; ++i) sums[i] = sums[i] * weight + out[i];
          totals_[head] = totals_[head] * weight + 1.0f;
          peak = *lse;
        }
      }
    }
  }
}

void ShareMerger::write(const Step& step, const LayerUnit& unit, std::byte* out) const {
  const int64_t size = unit.head_dim_v;
  const size_t head_bytes = static_cast<size_t>(size) * item_bytes(dtype_);
  for (const Piece& run : step.touched) {
    const int64_t first = (run.row * num_units_ + run.unit) * unit.num_query_heads;
    const int64_t last = first + run.num_units * unit.num_query_heads;
    for (int64_t head = first; head < last; ++head) {
      std::byte* to = out + static_cast<size_t>(head) * head_bytes;
      if (peaks_[head] == kEmpty) {
        std::memset(to, 0, head_bytes);
      } else {
        write_head(sums_.data() + head * size, 1.0f / totals_[head], size, dtype_, to);
      }
    }
  }
}

}  // namespace lamina
