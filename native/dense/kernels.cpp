#include "dense/kernels.h"

namespace lamina::dense {

#define LAMINA_KERNELS(isa)             \
  extern const Kernels kernels_##isa##_bf16; \
  extern const Kernels kernels_##isa##_f32

LAMINA_KERNELS(portable);
#if LAMINA_X86
LAMINA_KERNELS(avx2);
LAMINA_KERNELS(avx512);
LAMINA_KERNELS(avx512bf16);
#endif

const Kernels& kernels(Isa isa, Element element) {
  const bool is_bf16 = element == Element::bf16;
  switch (isa) {
#if LAMINA_X86
    case Isa::avx512bf16: return is_bf16 ? kernels_avx512bf16_bf16 : kernels_avx512bf16_f32;
    case Isa::avx512: return is_bf16 ? kernels_avx512_bf16 : kernels_avx512_f32;
    case Isa::avx2: return is_bf16 ? kernels_avx2_bf16 : kernels_avx2_f32;
#endif
    default: return is_bf16 ? kernels_portable_bf16 : kernels_portable_f32;
  }
}

}  // namespace lamina::dense
