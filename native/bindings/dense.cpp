#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <tuple>

#include "bindings/bindings.h"
#include "dense/program.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace lamina {
namespace {

using namespace dense;

using ViewTuple = std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t>;

View view_of(const ViewTuple& t) {
  const auto [buffer, offset, row_stride, head_stride, heads, width] = t;
  return {buffer, offset, row_stride, head_stride, heads, width};
}
View view_of(const std::optional<ViewTuple>& t) { return t ? view_of(*t) : View{}; }

template <typename Enum>
Enum choice(const std::string& name, std::initializer_list<const char*> names) {
  int value = 0;
  for (const char* known : names) {
    if (name == known) return static_cast<Enum>(value);
    ++value;
  }
  throw std::invalid_argument("unknown name " + name);
}

Element element_of(const std::string& name) {
  return choice<Element>(name, {"bfloat16", "float32"});
}

Isa isa_of(const std::string& name) {
  for (Isa isa : available_isas()) {
    if (name == isa_name(isa)) return isa;
  }
  throw std::invalid_argument("this machine does not run " + name);
}

}  // namespace

void bind_dense(nb::module_& module) {
  module.def(
      "argmax_rows",
      [](const std::string& element, uintptr_t data, int64_t num_rows, int64_t width,
         int64_t row_stride, const std::optional<std::string>& isa) {
        const Element type = element_of(element);
        const Kernels& table = kernels(isa ? isa_of(*isa) : active_isa(), type);
        std::vector<int64_t> indices(num_rows);
        std::vector<float> values(num_rows);
        {
          nb::gil_scoped_release released;
          for (int64_t row = 0; row < num_rows; ++row) {
            const uintptr_t at = data + row * row_stride * element_bytes(type);
            indices[row] = table.argmax(reinterpret_cast<const void*>(at), width, &values[row]);
          }
        }
        return std::make_tuple(std::move(indices), std::move(values));
      },
      "element"_a, "data"_a, "num_rows"_a, "width"_a, "row_stride"_a, "isa"_a = nb::none());

  nb::class_<PackedLinear>(module, "PackedLinear")
      .def("__init__",
           [](PackedLinear* self, const std::string& element, int64_t num_outputs,
              int64_t num_inputs) {
             new (self) PackedLinear(element_of(element), num_outputs, num_inputs);
           },
           "element"_a, "num_outputs"_a, "num_inputs"_a)
      .def("set",
           [](PackedLinear& self, int64_t first, uintptr_t weights, int64_t count,
              int64_t output_stride, int64_t input_stride, ThreadPool& pool) {
             nb::gil_scoped_release released;
             self.set(first, reinterpret_cast<const void*>(weights), count, output_stride,
                      input_stride, pool);
           },
           "first"_a, "weights"_a, "count"_a, "output_stride"_a, "input_stride"_a, "pool"_a)
      .def("set_bias",
           [](PackedLinear& self, int64_t first, const std::vector<float>& bias) {
             self.set_bias(first, bias.data(), static_cast<int64_t>(bias.size()));
           },
           "first"_a, "bias"_a)
      .def_prop_ro("num_outputs", &PackedLinear::num_outputs)
      .def_prop_ro("num_inputs", &PackedLinear::num_inputs)
      .def_prop_ro("num_bytes", &PackedLinear::bytes);

  nb::class_<Program>(module, "DenseProgram")
      .def("__init__",
           [](Program* self, const std::string& element, int num_arguments) {
             new (self) Program(element_of(element), num_arguments);
           },
           "element"_a, "num_arguments"_a)
      .def("scratch", &Program::add_scratch, "width"_a)
      .def("linear",
           [](Program& self, ViewTuple x, int linear, ViewTuple out,
              std::optional<ViewTuple> residual) {
             self.add(LinearOp{view_of(x), view_of(out), view_of(residual), linear});
           },
           "x"_a, "linear"_a, "out"_a, "residual"_a = nb::none())
      .def("norm",
           [](Program& self, ViewTuple x, ViewTuple out, int weight, int bias, float eps,
              const std::string& kind) {
             self.add(NormOp{view_of(x), view_of(out), weight, bias, eps,
                             choice<NormKind>(kind, {"rms", "rms_once", "layer"})});
           },
           "x"_a, "out"_a, "weight"_a, "bias"_a, "eps"_a, "kind"_a)
      .def("activation",
           [](Program& self, ViewTuple x, std::optional<ViewTuple> gate, ViewTuple out,
              const std::string& name) {
             self.add(ActivationOp{
                 view_of(x), view_of(gate), view_of(out),
                 choice<Activation>(name, {"silu", "gelu_tanh", "gelu", "relu"})});
           },
           "x"_a, "gate"_a.none(), "out"_a, "name"_a)
      .def("rotary",
           [](Program& self, ViewTuple x, ViewTuple cos, ViewTuple sin, ViewTuple out) {
             self.add(RotaryOp{view_of(x), view_of(cos), view_of(sin), view_of(out)});
           },
           "x"_a, "cos"_a, "sin"_a, "out"_a)
      .def("add",
           [](Program& self, ViewTuple x, std::optional<ViewTuple> other, ViewTuple out) {
             self.add(AddOp{view_of(x), view_of(other), view_of(out)});
           },
           "x"_a, "other"_a.none(), "out"_a);

  nb::class_<Workspace>(module, "DenseWorkspace")
      .def("__init__",
           [](Workspace* self, ThreadPool& pool, const std::optional<std::string>& isa) {
             new (self) Workspace(pool, isa ? isa_of(*isa) : active_isa());
           },
           "pool"_a, "isa"_a = nb::none(), nb::keep_alive<1, 2>());

  nb::class_<BoundProgram>(module, "BoundDenseProgram")
      .def("__init__",
           [](BoundProgram* self, std::shared_ptr<Program> program,
              std::shared_ptr<Workspace> workspace,
              std::vector<std::shared_ptr<PackedLinear>> linears,
              std::vector<std::vector<float>> vectors) {
             new (self) BoundProgram(
                 std::move(program), std::move(workspace),
                 {linears.begin(), linears.end()}, std::move(vectors));
           },
           "program"_a, "workspace"_a, "linears"_a, "vectors"_a)
      .def("run",
           [](const BoundProgram& self, int64_t num_rows, const std::vector<uintptr_t>& arguments) {
             nb::gil_scoped_release released;
             self.run(num_rows, arguments);
           },
           "num_rows"_a, "arguments"_a);
}

}  // namespace lamina
