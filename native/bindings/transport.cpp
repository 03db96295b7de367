#include "bindings/bindings.h"

namespace lamina {

void bind_transport(nanobind::module_& module) {}

}  // namespace lamina
