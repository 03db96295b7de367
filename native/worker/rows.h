// Which rows and heads of a step's tensors one executor gets, and copying them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace lamina {

/// Consecutive rows.
struct RowRun {
  int64_t begin;
  int64_t count;
};

/// Some rows of a step, in order.
class RowSet {
 public:
  RowSet() = default;
  explicit RowSet(std::vector<RowRun> runs) : runs_(std::move(runs)) {
    for (const RowRun& run : runs_) size_ += run.count;
  }

  int64_t size() const { return size_; }
  const std::vector<RowRun>& runs() const { return runs_; }

 private:
  std::vector<RowRun> runs_;
  int64_t size_ = 0;
};

/// An executor's heads of one tensor: `bytes` bytes at `offset` of every row of `row_bytes`.
struct HeadShare {
  size_t row_bytes;
  size_t offset;
  size_t bytes;
};

/// Pack the share of `rows` of `tensor` densely into `packed`; returns the end of what was written.
inline std::byte* gather_rows(const std::byte* tensor, const HeadShare& share, const RowSet& rows,
                              std::byte* packed) {
  for (const RowRun& run : rows.runs()) {
    const std::byte* row = tensor + run.begin * share.row_bytes + share.offset;
    if (share.bytes == share.row_bytes) {
      std::memcpy(packed, row, run.count * share.bytes);
      packed += run.count * share.bytes;
      continue;
    }
    for (int64_t i = 0; i < run.count; ++i, row += share.row_bytes, packed += share.bytes) {
      std::memcpy(packed, row, share.bytes);
    }
  }
  return packed;
}

/// The reverse: put densely packed rows at their place in `tensor`.
inline void scatter_rows(const std::byte* packed, const HeadShare& share, const RowSet& rows,
                         std::byte* tensor) {
  for (const RowRun& run : rows.runs()) {
    std::byte* row = tensor + run.begin * share.row_bytes + share.offset;
    for (int64_t i = 0; i < run.count; ++i, row += share.row_bytes, packed += share.bytes) {
      std::memcpy(row, packed, share.bytes);
    }
  }
}

}  // namespace lamina
