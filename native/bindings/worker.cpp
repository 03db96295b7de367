#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <utility>

#include "attention/schedule.h"
#include "bindings/bindings.h"
#include "bindings/interruptible.h"
#include "bindings/mailboxes.h"
#include "transport/slot_link.h"
#include "worker/layer_loop.h"

namespace nb = nanobind;

namespace lamina {

void bind_worker(nb::module_& module) {
  using ReleaseGil = nb::call_guard<nb::gil_scoped_release>;

  nb::class_<LayerLoop>(module, "LayerLoop")
      .def(
          "__init__",
          [](LayerLoop* self, Link& link, AttentionExecutor& executor, SlotInbox* plans,
             const std::vector<MailboxNumbers>& mailboxes, double step_deadline_s) {
            new (self)
                LayerLoop(link, executor, plans, step_mailboxes(mailboxes), step_deadline_s);
          },
          nb::arg("link"), nb::arg("executor"), nb::arg("plans").none(), nb::arg("mailboxes"),
          nb::arg("step_deadline_s"), nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
      .def("add", &LayerLoop::add)
      .def_prop_ro("in_step", &LayerLoop::in_step)
      .def("serve",
           [](LayerLoop& self, uint64_t next_plan, double wake_at) {
             return interruptible(
                 wake_at, [&](double until) { return self.serve(next_plan, until); });
           })
      .def("pump", &LayerLoop::pump, ReleaseGil())
      .def("times",
           [](const LayerLoop& self) {
             return std::pair(self.times().attend_s, self.times().finish_s);
           })
      .def("events", [](const LayerLoop& self) {
        std::vector<std::tuple<uint64_t, double, double, double, double>> events;
        for (const LayerEvent& event : self.events()) {
          events.emplace_back(event.number, event.attend_begin, event.attend_end,
                              event.finish_begin, event.finish_end);
        }
        return events;
      });
}

}  // namespace lamina
