// Names of dtypes as Python gives them.
#pragma once

#include <stdexcept>
#include <string>

#include "attention/layout.h"

namespace lamina {

inline Dtype dtype_named(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "float16") return Dtype::float16;
  if (name == "bfloat16") return Dtype::bfloat16;
  throw std::invalid_argument("dtype must be float32, float16 or bfloat16, got " + name);
}

}  // namespace lamina
