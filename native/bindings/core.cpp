#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.h"
#include "core/isa.h"
#include "core/threads.h"

namespace nb = nanobind;

namespace lamina {

void bind_core(nb::module_& module) {
  module.def("active_isa", [] { return std::string(isa_name(active_isa())); });
  module.def("available_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : available_isas()) names.emplace_back(isa_name(isa));
    return names;
  });
  nb::class_<ThreadPool>(module, "ThreadPool")
      .def(nb::init<int, std::vector<int>>(), nb::arg("num_threads"),
           nb::arg("cores") = std::vector<int>())
      .def("grow", &ThreadPool::grow, nb::arg("num_threads"),
           nb::arg("cores") = std::vector<int>())
      .def_prop_ro("num_threads", &ThreadPool::num_threads);
}

}  // namespace lamina
