#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <tuple>
#include <utility>

#include "attention/schedule.h"
#include "bindings/bindings.h"
#include "bindings/interruptible.h"
#include "transport/slot_link.h"
#include "worker/executor_end.h"

namespace nb = nanobind;

namespace lamina {
namespace {

using Share = std::tuple<size_t, size_t, size_t>;
using Mailboxes = std::array<size_t, 6>;
using Runs = std::vector<std::pair<int64_t, int64_t>>;

HeadShare head_share(const Share& share) {
  return {std::get<0>(share), std::get<1>(share), std::get<2>(share)};
}

std::vector<LayerShare> layer_shares(const std::vector<std::array<Share, 4>>& layers) {
  std::vector<LayerShare> shares;
  for (const auto& [q, k, v, out] : layers) {
    shares.push_back({head_share(q), head_share(k), head_share(v), head_share(out)});
  }
  return shares;
}

std::vector<StepMailboxes> step_mailboxes(const std::vector<Mailboxes>& micro_batches) {
  std::vector<StepMailboxes> mailboxes;
  for (const auto& [q, kv, out, q_bytes, kv_bytes, out_bytes] : micro_batches) {
    mailboxes.push_back({static_cast<uint16_t>(q), static_cast<uint16_t>(kv),
                         static_cast<uint16_t>(out), q_bytes, kv_bytes, out_bytes});
  }
  return mailboxes;
}

RowSet row_set(const Runs& runs) {
  std::vector<RowRun> rows;
  for (const auto& [begin, count] : runs) rows.push_back({begin, count});
  return RowSet(std::move(rows));
}

const std::byte* memory(uintptr_t address) { return reinterpret_cast<const std::byte*>(address); }

}  // namespace

void bind_worker(nb::module_& module) {
  using ReleaseGil = nb::call_guard<nb::gil_scoped_release>;

  nb::class_<ExecutorEnd>(module, "ExecutorEnd")
      .def(
          "__init__",
          [](ExecutorEnd* self, Link& link, const std::vector<std::array<Share, 4>>& layers,
             const std::vector<Mailboxes>& mailboxes) {
            new (self) ExecutorEnd(link, layer_shares(layers), step_mailboxes(mailboxes));
          },
          nb::keep_alive<1, 2>())
      .def("begin",
           [](ExecutorEnd& self, int micro_batch, const Runs& attending, const Runs& stored) {
             self.begin(micro_batch, row_set(attending), row_set(stored));
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
}

}  // namespace lamina
