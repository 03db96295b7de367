#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <utility>

#include "attention/schedule.h"
#include "bindings/bindings.h"
#include "bindings/interruptible.h"
#include "transport/slots.h"
#include "worker/layer_loop.h"

namespace nb = nanobind;

namespace lamina {
namespace {

using Boxes = std::tuple<SlotInbox*, SlotInbox*, Outbox*>;
using Channel = std::tuple<std::vector<Boxes>, Outbox*, int, int>;

std::vector<LayerLoop::Channel> channels_of(const std::vector<Channel>& given) {
  std::vector<LayerLoop::Channel> channels;
  for (const auto& [all_boxes, report, first_layer, layer_step] : given) {
    LayerLoop::Channel channel{{}, report, first_layer, layer_step};
    for (const auto& [q, kv, out] : all_boxes) channel.boxes.push_back({q, kv, out});
    channels.push_back(std::move(channel));
  }
  return channels;
}

}  // namespace

void bind_layer_loop(nb::module_& module) {
  using namespace nb::literals;

  // Mailboxes belong to their links, which serving.py keeps.
  nb::class_<LayerLoop>(module, "LayerLoop")
      .def(
          "__init__",
          [](LayerLoop* self, AttentionExecutor& executor, SlotInbox& plans,
             const std::vector<Channel>& channels, double step_deadline_s) {
            new (self) LayerLoop(executor, plans, channels_of(channels), step_deadline_s);
          },
          "executor"_a, "plans"_a, "channels"_a, "step_deadline_s"_a, nb::keep_alive<1, 2>())
      .def("add", &LayerLoop::add, "channel"_a, "number"_a, "first_message"_a, "schedule"_a)
      .def("serve",
           [](LayerLoop& self, uint64_t next_plan, double wake_at) {
             return interruptible(
                 wake_at, [&](double until) { return self.serve(next_plan, until); });
           })
      .def("pump", &LayerLoop::pump, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace lamina
