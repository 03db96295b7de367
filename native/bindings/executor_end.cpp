#include "worker/executor_end.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <tuple>

#include "bindings/bindings.h"
#include "bindings/dtypes.h"
#include "bindings/interruptible.h"
#include "transport/slots.h"
#include "worker/merge.h"

namespace nb = nanobind;

namespace lamina {
namespace {

using UnitSizes = std::tuple<size_t, size_t, size_t, size_t, int64_t, int64_t>;
using PieceNumbers = std::array<int64_t, 4>;

/// As `lamina.transport.topology.StepMailboxes`: q, kv, out and report, then their bytes.
using MailboxNumbers = std::array<size_t, 8>;

std::vector<LayerUnit> layer_units(const std::vector<UnitSizes>& layers) {
  std::vector<LayerUnit> units;
  for (const auto& [q, k, v, out, num_heads, head_dim_v] : layers) {
    units.push_back({q, k, v, out, num_heads, head_dim_v});
  }
  return units;
}

std::vector<Piece> pieces_of(const std::vector<PieceNumbers>& numbers) {
  std::vector<Piece> pieces;
  for (const auto& [row, num_rows, unit, num_units] : numbers) {
    pieces.push_back({row, num_rows, unit, num_units});
  }
  return pieces;
}

std::vector<StepMailboxes> step_mailboxes(const std::vector<MailboxNumbers>& micro_batches) {
  std::vector<StepMailboxes> mailboxes;
  for (const auto& [q, kv, out, report, q_bytes, kv_bytes, out_bytes, report_bytes] :
       micro_batches) {
    mailboxes.push_back({static_cast<uint16_t>(q), static_cast<uint16_t>(kv),
                         static_cast<uint16_t>(out), q_bytes, kv_bytes, out_bytes});
  }
  return mailboxes;
}

const std::byte* memory(uintptr_t address) { return reinterpret_cast<const std::byte*>(address); }

}  // namespace

void bind_executor_end(nb::module_& module) {
  using ReleaseGil = nb::call_guard<nb::gil_scoped_release>;

  nb::class_<ExecutorEnd>(module, "ExecutorEnd")
      .def(
          "__init__",
          [](ExecutorEnd* self, Link& link, Link& out_link, const std::vector<UnitSizes>& layers,
             int64_t num_units, int64_t page_units,
             const std::vector<MailboxNumbers>& mailboxes) {
            new (self) ExecutorEnd(link, out_link, layer_units(layers), num_units, page_units,
                                   step_mailboxes(mailboxes));
          },
          nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
      .def("begin",
           [](ExecutorEnd& self, int micro_batch, const std::vector<PieceNumbers>& attending,
              const std::vector<PieceNumbers>& stored, bool is_partial) {
             self.begin(micro_batch, pieces_of(attending), pieces_of(stored), is_partial);
           })
      .def(
          "post_q",
          [](ExecutorEnd& self, int micro_batch, int layer, uint64_t number, uintptr_t q,
             double deadline) { self.post_q(micro_batch, layer, number, memory(q), deadline); },
          ReleaseGil())
      .def(
          "post_kv",
          [](ExecutorEnd& self, int micro_batch, int layer, uint64_t number, uintptr_t k,
             uintptr_t v, double deadline) {
            self.post_kv(micro_batch, layer, number, memory(k), memory(v), deadline);
          },
          ReleaseGil())
      .def("attends_whole",
           [](const ExecutorEnd& self, int micro_batch, int64_t num_rows) {
             return self.attending(micro_batch).is_whole(num_rows);
           })
      .def("has_out", &ExecutorEnd::has_out)
      .def(
          "out_inbox",
          [](ExecutorEnd& self, int micro_batch) -> SlotInbox& {
            return dynamic_cast<SlotInbox&>(self.out_inbox(micro_batch));
          },
          nb::rv_policy::reference)
      .def(
          "wait_out",
          [](ExecutorEnd& self, int micro_batch, int layer, uint64_t number, double deadline) {
            return reinterpret_cast<uintptr_t>(interruptible(deadline, [&](double until) {
              return self.wait_out(micro_batch, layer, number, until);
            }));
          })
      .def(
          "collect_out",
          [](ExecutorEnd& self, int micro_batch, int layer, uint64_t number, uintptr_t out,
             double deadline) {
            interruptible(deadline, [&](double until) {
              self.collect_out(micro_batch, layer, number, reinterpret_cast<std::byte*>(out),
                               until);
            });
          });

  nb::class_<ShareMerger>(module, "ShareMerger")
      .def("__init__",
           [](ShareMerger* self, const std::vector<UnitSizes>& layers, int64_t num_units,
              const std::string& dtype, int num_micro_batches) {
             new (self) ShareMerger(layer_units(layers), num_units, dtype_named(dtype),
                                    num_micro_batches);
           })
      .def("begin",
           [](ShareMerger& self, int micro_batch, int64_t num_rows,
              const std::vector<ExecutorEnd*>& ends) { self.begin(micro_batch, num_rows, ends); })
      .def("collect", [](ShareMerger& self, int micro_batch, int layer, uint64_t number,
                         uintptr_t out, double deadline) {
        interruptible(deadline, [&](double until) {
          self.collect(micro_batch, layer, number, reinterpret_cast<std::byte*>(out), until);
        });
      });
}

}  // namespace lamina
