#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "attention/paged.h"
#include "bindings/bindings.h"
#include "bindings/dtypes.h"
#include "core/memory.h"
#include "core/read_speed.h"

namespace nb = nanobind;

namespace lamina {
namespace {

template <typename T>
using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T>
std::span<const T> span_of(const Array<T>& array) {
  return {array.data(), array.size()};
}

CacheType cache_type_named(const std::string& name) {
  if (name == "int8") return CacheType::int8;
  switch (dtype_named(name)) {
    case Dtype::float32: return CacheType::float32;
    case Dtype::float16: return CacheType::float16;
    case Dtype::bfloat16: return CacheType::bfloat16;
  }
  __builtin_unreachable();
}

Isa isa_named(const std::string& name) {
  if (name.empty()) return active_isa();
  for (Isa isa : available_isas()) {
    if (name == isa_name(isa)) return isa;
  }
  throw std::invalid_argument("this machine has no instruction set level " + name);
}

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_attention(nb::module_& module) {
  using ReleaseGil = nb::call_guard<nb::gil_scoped_release>;

  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const MemoryShortage& shortage) {
      const nb::object type = nb::module_::import_("lamina.errors").attr("CapacityError");
      PyErr_SetString(type.ptr(), shortage.what());
    }
  });

  nb::class_<LayerSpec>(module, "LayerSpec")
      .def(
          "__init__",
          [](LayerSpec* self, int query_heads, int kv_heads, int head_dim_k, int head_dim_v,
             double scale, int64_t window, double softcap, std::vector<float> sinks) {
            new (self) LayerSpec{query_heads,
                                 kv_heads,
                                 head_dim_k,
                                 head_dim_v,
                                 static_cast<float>(scale),
                                 window == 0 ? kNoWindow : window,
                                 static_cast<float>(softcap),
                                 std::move(sinks)};
          },
          nb::kw_only(), nb::arg("query_heads"), nb::arg("kv_heads"), nb::arg("head_dim_k"),
          nb::arg("head_dim_v"), nb::arg("scale"), nb::arg("window"), nb::arg("softcap"),
          nb::arg("sinks"));

  module.def(
      "page_bytes",
      [](const std::vector<LayerSpec>& layers, const std::string& cache_dtype, int page_tokens) {
        return page_bytes(layers, cache_type_named(cache_dtype), page_tokens);
      },
      nb::arg("layers"), nb::arg("cache_dtype"), nb::arg("page_tokens"));
  module.def("available_memory_bytes", &available_memory_bytes);

  nb::class_<MemoryReader>(module, "MemoryReader")
      .def(nb::init<size_t, std::shared_ptr<ThreadPool>>(), nb::arg("num_bytes"), nb::arg("pool"))
      .def_prop_ro("size", &MemoryReader::size)
      .def("read", &MemoryReader::read, ReleaseGil());

  nb::class_<StepSchedule>(module, "StepSchedule")
      .def_prop_ro("num_stored_rows", &StepSchedule::num_stored_rows)
      .def_prop_ro("num_attending_rows", &StepSchedule::num_attending_rows)
      .def_prop_ro("is_partial", &StepSchedule::is_partial)
      .def_ro("is_over", &StepSchedule::is_over)
      .def("revoke", &StepSchedule::revoke, nb::arg("lane"))
      .def("follow", &StepSchedule::follow, nb::arg("step"));

  nb::class_<AttentionExecutor>(module, "AttentionExecutor")
      .def_prop_ro("num_layers", &AttentionExecutor::num_layers)
      .def(
          "attend_cached",
          [](AttentionExecutor& self, StepSchedule& step, int layer, uintptr_t q) {
            self.attend_cached(step, layer, at<const std::byte>(q));
          },
          nb::arg("step"), nb::arg("layer"), nb::arg("q"), ReleaseGil())
      .def(
          "finish",
          [](AttentionExecutor& self, StepSchedule& step, int layer, uintptr_t k, uintptr_t v,
             uintptr_t out) {
            self.finish(step, layer, at<const std::byte>(k), at<const std::byte>(v),
                        at<std::byte>(out));
          },
          nb::arg("step"), nb::arg("layer"), nb::arg("k"), nb::arg("v"), nb::arg("out"),
          ReleaseGil());

  nb::class_<PagedAttention, AttentionExecutor>(module, "PagedAttention")
      .def(
          "__init__",
          [](PagedAttention* self, std::vector<LayerSpec> layers, const std::string& dtype,
             const std::string& cache_dtype, int64_t num_pages, int page_tokens,
             std::shared_ptr<ThreadPool> pool, const std::string& isa) {
            // Touching all pages takes seconds, in which other threads have heartbeats to send.
            const nb::gil_scoped_release release;
            new (self) PagedAttention(std::move(layers), dtype_named(dtype),
                                      cache_type_named(cache_dtype), num_pages, page_tokens,
                                      std::move(pool), isa_named(isa));
          },
          nb::arg("layers"), nb::arg("dtype"), nb::arg("cache_dtype"), nb::arg("num_pages"),
          nb::arg("page_tokens"), nb::arg("pool"), nb::arg("isa") = "")
      .def(
          "begin",
          [](PagedAttention& self, const Array<int32_t>& num_attending,
             const Array<int32_t>& num_stored, const Array<int64_t>& context_tokens,
             const Array<int64_t>& first_position, const Array<int32_t>& heads,
             const Array<int32_t>& num_pages, const Array<int32_t>& pages, bool is_partial) {
            return self.begin({span_of(num_attending), span_of(num_stored),
                               span_of(context_tokens), span_of(first_position), span_of(heads),
                               span_of(num_pages), span_of(pages), is_partial});
          },
          nb::arg("num_attending"), nb::arg("num_stored"), nb::arg("context_tokens"),
          nb::arg("first_position"), nb::arg("heads"), nb::arg("num_pages"), nb::arg("pages"),
          nb::arg("is_partial"));
}

}  // namespace lamina
