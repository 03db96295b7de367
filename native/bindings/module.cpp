#include "bindings/bindings.h"

NB_MODULE(_native, module) {
  module.doc() = "Lamina's native data plane; described for Python in _native.pyi.";
  // What is still alive when the process ends is none of its user's business.
  nanobind::set_leak_warnings(false);
  lamina::bind_core(module);
  lamina::bind_transport(module);
  lamina::bind_attention(module);
  lamina::bind_worker(module);
  lamina::bind_dense(module);
}
