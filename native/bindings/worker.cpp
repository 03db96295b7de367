#include "bindings/bindings.h"

namespace lamina {

void bind_worker(nanobind::module_& module) {}

}  // namespace lamina
