// The kernels of each level, by cache type.
#pragma once

#include "attention/kernels.h"

namespace lamina {

struct KernelTable {
  Kernels float32, float16, bfloat16, int8;
};

extern const KernelTable kPortableKernels;
#if LAMINA_X86
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
/// The rest is as in kAvx512Kernels.
extern const Kernels kAvx512Bf16Kernels;
#endif

}  // namespace lamina
