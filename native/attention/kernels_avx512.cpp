// clang-format off: Vec comes before what is written in terms of it
#include "attention/vec_avx512.h"
#include "attention/attend.h"
// clang-format on
#include "attention/kernel_tables.h"

namespace lamina {

const KernelTable kAvx512Kernels = {
    {&attend<PlainMath<CacheType::float32, 4, 4>>, &merge, &write},
    {&attend<PlainMath<CacheType::float16, 4, 4>>, &merge, &write},
    {&attend<PlainMath<CacheType::bfloat16, 4, 4>>, &merge, &write},
    {&attend<PlainMath<CacheType::int8, 4, 2>>, &merge, &write},
};

}  // namespace lamina
