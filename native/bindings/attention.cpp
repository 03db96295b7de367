#include "bindings/bindings.h"

namespace lamina {

void bind_attention(nanobind::module_& module) {}

}  // namespace lamina
