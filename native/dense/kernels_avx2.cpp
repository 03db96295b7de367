#include "dense/vec.h"

#define LAMINA_DOT_BF16 0

namespace lamina::dense {
namespace {

constexpr int kStreamRows = 4;
constexpr int kTileRows = 4;
constexpr int kTilePanels = 1;

}  // namespace
}  // namespace lamina::dense

#include "dense/linear_impl.h"
#include "dense/rows_impl.h"

namespace lamina::dense {

extern const Kernels kernels_avx2_bf16 = table_of<Bf16>();
extern const Kernels kernels_avx2_f32 = table_of<float>();

}  // namespace lamina::dense
