#include "worker/pieces.h"

#include <stdexcept>

namespace lamina {

Pieces::Pieces(std::span<const Piece> pieces, int64_t num_units, int64_t page_units)
    : num_units_(num_units) {
  for (const Piece& piece : pieces) {
    if (piece.row < 0 || piece.num_rows <= 0 || piece.unit < 0 || piece.num_units <= 0 ||
        piece.unit + piece.num_units > num_units || piece.num_units % page_units != 0) {
      throw std::invalid_argument("a piece is of whole lanes of the tensor's rows");
    }
    num_cells_ += piece.num_rows * piece.num_units;
    if (piece.num_rows == 1) {  // the lanes of one row adjoin
      append(piece);
      continue;
    }
    for (int64_t unit = 0; unit < piece.num_units; unit += page_units) {
      append({piece.row, piece.num_rows, piece.unit + unit, page_units});
    }
  }
}

/// Add a run, as a part of the last one where it continues that.
void Pieces::append(const Piece& run) {
  if (!runs_.empty()) {
    Piece& last = runs_.back();
    if (last.row + last.num_rows == run.row && last.unit == run.unit &&
        last.num_units == run.num_units) {
      last.num_rows += run.num_rows;
      return;
    }
  }
  runs_.push_back(run);
}

}  // namespace lamina
