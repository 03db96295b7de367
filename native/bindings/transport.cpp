#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>

#include "bindings/bindings.h"
#include "bindings/interruptible.h"
#include "core/wait.h"
#include "transport/faulty.h"
#include "transport/hop.h"
#include "transport/inproc.h"
#include "transport/shm.h"
#include "transport/tcp.h"
#include "transport/wait_any.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace lamina {

namespace {

void translate(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const TransportFailure& failure) {
    const char* name = failure.kind == TransportFailure::Kind::peer_lost  ? "PeerLost"
                       : failure.kind == TransportFailure::Kind::deadline ? "DeadlineExceeded"
                                                                          : "ProtocolMismatch";
    try {
      nb::object type = nb::module_::import_("lamina.errors").attr(name);
      nb::object error = type(failure.what(), "peer"_a = failure.peer);
      PyErr_SetObject(type.ptr(), error.ptr());
    } catch (nb::python_error& other) {  // a signal's, for one
      other.restore();
    }
  }
}

/// `parts`: address and length of each part of the payload in turn.
void post(Outbox& outbox, uint64_t seq, double deadline, const nb::args& parts) {
  constexpr size_t kMaxParts = 16;
  std::pair<const void*, size_t> pieces[kMaxParts];
  const size_t num_parts = parts.size() / 2;
  if (num_parts > kMaxParts) throw std::invalid_argument("a message has at most 16 parts");
  size_t num_bytes = 0;
  for (size_t i = 0; i < num_parts; ++i) {
    pieces[i] = {reinterpret_cast<const void*>(nb::cast<uintptr_t>(parts[2 * i])),
                 nb::cast<size_t>(parts[2 * i + 1])};
    num_bytes += pieces[i].second;
  }
  nb::gil_scoped_release release;
  std::byte* slot = outbox.reserve(seq, num_bytes, deadline);
  for (size_t i = 0; i < num_parts; ++i) {
    if (pieces[i].second != 0) std::memcpy(slot, pieces[i].first, pieces[i].second);
    slot += pieces[i].second;
  }
  outbox.commit(deadline);
}

std::pair<int, size_t> wait(SlotInbox& inbox, uint64_t seq, double deadline,
                            std::optional<size_t> num_bytes) {
  const auto payload = interruptible(
      deadline, [&](double until) { return inbox.wait(seq, until, num_bytes); });
  return {payload.data() == inbox.memory().slot(0) ? 0 : 1, payload.size()};
}

size_t wait_for_any(const std::vector<std::pair<SlotInbox*, uint64_t>>& awaited,
                    double deadline) {
  std::vector<Awaited> all;
  for (const auto& [inbox, seq] : awaited) all.push_back({inbox, seq});
  return interruptible(deadline, [&](double until) { return wait_any(all, until); });
}

/// The memory of a slot as a torch tensor that keeps it alive, but not its link.
nb::ndarray<nb::pytorch, uint8_t, nb::ndim<1>> slot(const SlotInbox& inbox, int index) {
  auto* owner = new std::shared_ptr<Memory>(inbox.memory().memory);
  const nb::capsule capsule(
      owner, [](void* pointer) noexcept { delete static_cast<std::shared_ptr<Memory>*>(pointer); });
  const size_t shape[1] = {inbox.capacity_bytes()};
  return {inbox.memory().slot(static_cast<uint64_t>(index)), 1, shape, capsule};
}

/// A Python function as pump. Known by type, so that the garbage collector can see it.
struct PythonPump {
  nb::object function;
  void operator()() const {
    nb::gil_scoped_acquire acquire;
    function();
  }
};

int traverse_inproc(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (!nb::inst_ready(self)) return 0;
  const auto* pump = nb::inst_ptr<InprocLink>(self)->pump().target<PythonPump>();
  if (pump != nullptr) Py_VISIT(pump->function.ptr());
  return 0;
}

int clear_inproc(PyObject* self) {
  if (nb::inst_ready(self)) nb::inst_ptr<InprocLink>(self)->drop_pump();
  return 0;
}

PyType_Slot inproc_slots[] = {
    {Py_tp_traverse, reinterpret_cast<void*>(traverse_inproc)},
    {Py_tp_clear, reinterpret_cast<void*>(clear_inproc)},
    {0, nullptr},
};

FaultKind fault_kind(const std::string& name) {
  constexpr const char* kNames[] = {"delay", "drop", "reorder", "truncate", "close", "kill"};
  for (int i = 0; i < 6; ++i) {
    if (name == kNames[i]) return static_cast<FaultKind>(i);
  }
  throw std::invalid_argument("no fault is called " + name);
}

void bind_hop(nb::module_& module) {
  module.def(
      "ping",
      [](Outbox& outbox, SlotInbox& inbox, uint64_t first_seq, int64_t count, size_t num_bytes,
         bool check, double timeout_s) {
        nb::gil_scoped_release release;
        return ping(outbox, inbox, {first_seq, count, num_bytes, check, timeout_s});
      },
      "outbox"_a, "inbox"_a, "first_seq"_a, "count"_a, "num_bytes"_a, "check"_a, "timeout_s"_a);
  module.def(
      "pong",
      [](SlotInbox& inbox, Outbox& outbox, uint64_t first_seq, int64_t count, size_t num_bytes,
         bool check, double timeout_s) {
        nb::gil_scoped_release release;
        pong(inbox, outbox, {first_seq, count, num_bytes, check, timeout_s});
      },
      "inbox"_a, "outbox"_a, "first_seq"_a, "count"_a, "num_bytes"_a, "check"_a, "timeout_s"_a);
  module.def(
      "bare_ping",
      [](int fd, int64_t count, size_t num_bytes, bool yields) {
        nb::gil_scoped_release release;
        return bare_ping(fd, count, num_bytes, yields);
      },
      "fd"_a, "count"_a, "num_bytes"_a, "yields"_a);
  module.def(
      "bare_pong",
      [](int fd, int64_t count, size_t num_bytes, bool yields) {
        nb::gil_scoped_release release;
        bare_pong(fd, count, num_bytes, yields);
      },
      "fd"_a, "count"_a, "num_bytes"_a, "yields"_a);
}

}  // namespace

void bind_transport(nb::module_& module) {
  nb::register_exception_translator(translate);
  module.attr("PACER_YIELD_S") = Pacer::kYieldSeconds;

  // Mailboxes belong to their link: Python objects of them must not outlive it (native.py).
  nb::class_<Outbox>(module, "Outbox")
      .def_prop_ro("capacity_bytes", &Outbox::capacity_bytes)
      .def("has_room", &Outbox::has_room)
      .def("post", &post);
  nb::class_<SlotInbox>(module, "Inbox")
      .def_prop_ro("capacity_bytes", &SlotInbox::capacity_bytes)
      .def("wait", &wait, "seq"_a, "deadline"_a, "num_bytes"_a.none())
      .def("holds", &SlotInbox::holds, "seq"_a)
      .def("slot", &slot, "index"_a);
  nb::class_<Link>(module, "Link")
      .def_prop_ro("peer", &Link::peer)
      .def("outbox", &Link::outbox, "mailbox"_a, "capacity_bytes"_a, nb::rv_policy::reference)
      .def(
          "inbox",
          [](Link& link, uint16_t mailbox, size_t capacity_bytes) -> SlotInbox& {
            return dynamic_cast<SlotInbox&>(link.inbox(mailbox, capacity_bytes));
          },
          "mailbox"_a, "capacity_bytes"_a, nb::rv_policy::reference)
      .def("fail", &Link::fail, "reason"_a)
      .def("close", &Link::close, nb::call_guard<nb::gil_scoped_release>());
  module.def("wait_any", &wait_for_any, "awaited"_a, "deadline"_a);
  nb::class_<InprocLink, Link>(module, "InprocLink", nb::type_slots(inproc_slots));
  nb::class_<ShmLink, Link>(module, "ShmLink")
      .def(nb::init<int, std::string, double>(), "fd"_a, "peer"_a, "yield_s"_a);
  nb::class_<TcpLink, Link>(module, "TcpLink")
      .def(nb::init<int, std::string, uint16_t, double>(), "fd"_a, "peer"_a, "version"_a,
           "busy_poll_s"_a);
  nb::class_<FaultyLink, Link>(module, "FaultyLink")
      .def(nb::init<std::shared_ptr<Link>>(), "link"_a)
      .def(
          "inject",
          [](FaultyLink& link, const std::string& kind, std::optional<uint16_t> mailbox,
             int64_t after, std::optional<int64_t> count, double delay_s) {
            link.inject({fault_kind(kind), mailbox, after, count, delay_s});
          },
          "kind"_a, "mailbox"_a.none(), "after"_a, "count"_a.none(), "delay_s"_a)
      .def("clear", &FaultyLink::clear);
  module.def(
      "inproc_pair",
      [](const std::string& name_a, const std::string& name_b, nb::object pump_b) {
        return inproc_pair(name_a, name_b,
                           pump_b.is_none() ? std::function<void()>()
                                            : std::function<void()>(PythonPump{pump_b}));
      },
      "name_a"_a, "name_b"_a, "pump_b"_a.none());
  bind_hop(module);
}

}  // namespace lamina
