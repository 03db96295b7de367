// Native waits that leave the interpreter to others and let it handle signals now and then.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>

#include "core/wait.h"
#include "transport/link.h"

namespace lamina {

/// Longest native wait without a look for signals (Ctrl-C).
constexpr double kSignalSeconds = 0.1;

/// Run `wait(deadline)` without the interpreter, which handles signals now and then.
template <typename Wait>
auto interruptible(double deadline, const Wait& wait) {
  while (true) {
    const double until = std::min(deadline, monotonic_s() + kSignalSeconds);
    try {
      nanobind::gil_scoped_release release;
      return wait(until);
    } catch (const TransportFailure& failure) {
      const bool is_early = failure.kind == TransportFailure::Kind::deadline && until < deadline &&
                            monotonic_s() >= until;
      if (!is_early) throw;
    }
    if (PyErr_CheckSignals() != 0) throw nanobind::python_error();
  }
}

}  // namespace lamina
