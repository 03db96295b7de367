#include "core/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace lamina {
namespace {

constexpr Isa kLevels[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512bf16};

bool has(Isa isa) {
#if LAMINA_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  switch (isa) {
    case Isa::portable: return true;
    case Isa::avx2: return avx2;
    case Isa::avx512: return avx512;
    case Isa::avx512bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return isa == Isa::portable;
}

Isa choose() {
  const std::vector<Isa> available = available_isas();
  const char* forced = std::getenv("LAMINA_ISA");
  if (forced == nullptr || *forced == '\0') return available.back();
  std::string names;
  for (Isa isa : available) {
    if (std::string(forced) == isa_name(isa)) return isa;
    names += std::string(names.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::invalid_argument("LAMINA_ISA must be one of " + names + " on this machine, got " +
                              forced);
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::portable: return "portable";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512bf16: return "avx512bf16";
  }
  return "unknown";
}

std::vector<Isa> available_isas() {
  std::vector<Isa> available;
  for (Isa isa : kLevels) {
    if (has(isa)) available.push_back(isa);
  }
  return available;
}

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace lamina
