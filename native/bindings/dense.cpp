#include "bindings/bindings.h"

namespace lamina {

void bind_dense(nanobind::module_& module) {}

}  // namespace lamina
