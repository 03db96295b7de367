// Which instructions this process uses. Code of a level runs only where `active_isa()` allows it.
#pragma once

#include <string>
#include <vector>

namespace lamina {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };

const char* isa_name(Isa isa);

/// Levels that this machine can run, lowest first. `portable` is always among them.
std::vector<Isa> available_isas();

/// The highest available level, or what the environment variable LAMINA_ISA forces. Read once.
/// Throws std::invalid_argument if LAMINA_ISA names no level or one that the machine lacks.
Isa active_isa();

}  // namespace lamina
