// Which rows and heads of a step's tensors one executor gets, and copying them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

namespace lamina {

/// Some consecutive head units of consecutive rows.
struct Piece {
  int64_t row;
  int64_t num_rows;
  int64_t unit;
  int64_t num_units;
};

/// What an executor gets of a step's tensors [T, units], in the order of its payloads: piece by piece,
/// for each lane of `page_units` units the rows. Kept as runs, each of them row by row in a payload.
class Pieces {
 public:
  Pieces() = default;

  /// `num_units`: of a row; `page_units` divides the units of every piece.
  Pieces(std::span<const Piece> pieces, int64_t num_units, int64_t page_units);

  const std::vector<Piece>& runs() const { return runs_; }

  /// Whether payloads are the whole tensors of `num_rows` rows, as they lie.
  bool is_whole(int64_t num_rows) const {
    return runs_.size() == 1 && runs_[0].num_rows == num_rows && runs_[0].num_units == num_units_;
  }

  /// Rows times units.
  int64_t num_cells() const { return num_cells_; }

  /// Copy to `packed` from a tensor with `unit_bytes` bytes per row and unit; returns the end.
  std::byte* gather(const std::byte* tensor, size_t unit_bytes, std::byte* packed) const {
    const size_t row_bytes = unit_bytes * static_cast<size_t>(num_units_);
    for (const Piece& run : runs_) {
      const std::byte* row = tensor + run.row * row_bytes + run.unit * unit_bytes;
      const size_t num_bytes = run.num_units * unit_bytes;
      if (num_bytes == row_bytes) {
        std::memcpy(packed, row, run.num_rows * row_bytes);
        packed += run.num_rows * row_bytes;
        continue;
      }
      for (int64_t i = 0; i < run.num_rows; ++i, row += row_bytes, packed += num_bytes) {
        std::memcpy(packed, row, num_bytes);
      }
    }
    return packed;
  }

  /// The reverse.
  void scatter(const std::byte* packed, size_t unit_bytes, std::byte* tensor) const {
    const size_t row_bytes = unit_bytes * static_cast<size_t>(num_units_);
    for (const Piece& run : runs_) {
      std::byte* row = tensor + run.row * row_bytes + run.unit * unit_bytes;
      const size_t num_bytes = run.num_units * unit_bytes;
      for (int64_t i = 0; i < run.num_rows; ++i, row += row_bytes, packed += num_bytes) {
        std::memcpy(row, packed, num_bytes);
      }
    }
  }

 private:
  void append(const Piece& run);

  std::vector<Piece> runs_;
  int64_t num_units_ = 1;
  int64_t num_cells_ = 0;
};

}  // namespace lamina
