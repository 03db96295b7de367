// clang-format off: Vec comes before what is written in terms of it
#include "attention/vec_portable.h"
#include "attention/attend.h"
// clang-format on
#include "attention/kernel_tables.h"

namespace lamina {

const KernelTable kPortableKernels = {
    {&attend<PlainMath<CacheType::float32, 2, 2>>, &merge, &write},
    {&attend<PlainMath<CacheType::float16, 2, 2>>, &merge, &write},
    {&attend<PlainMath<CacheType::bfloat16, 2, 2>>, &merge, &write},
    {&attend<PlainMath<CacheType::int8, 2, 2>>, &merge, &write},
};

}  // namespace lamina
