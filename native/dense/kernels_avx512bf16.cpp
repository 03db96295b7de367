#include "dense/vec.h"

#define LAMINA_DOT_BF16 1

namespace lamina::dense {
namespace {

constexpr int kStreamRows = 8;
constexpr int kTileRows = 10;
constexpr int kTilePanels = 2;

}  // namespace
}  // namespace lamina::dense

#include "dense/linear_impl.h"
#include "dense/rows_impl.h"

namespace lamina::dense {

extern const Kernels kernels_avx512bf16_bf16 = table_of<Bf16>();
extern const Kernels kernels_avx512bf16_f32 = table_of<float>();

}  // namespace lamina::dense
