// Functions that add the classes of a folder, or of a part of it, to the module.
#pragma once

#include <nanobind/nanobind.h>

namespace lamina {

void bind_core(nanobind::module_& module);
void bind_attention(nanobind::module_& module);
void bind_transport(nanobind::module_& module);
void bind_executor_end(nanobind::module_& module);
void bind_layer_loop(nanobind::module_& module);
void bind_dense(nanobind::module_& module);

}  // namespace lamina
