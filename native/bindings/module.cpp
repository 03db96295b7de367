#include "bindings/bindings.h"

NB_MODULE(_native, module) {
  module.doc() = "Lamina's native data plane; described for Python in _native.pyi.";
  // Caches of torch.compile keep objects alive to the very end; that is no leak.
  nanobind::set_leak_warnings(false);
  lamina::bind_core(module);
  lamina::bind_transport(module);
  lamina::bind_attention(module);
  lamina::bind_executor_end(module);
  lamina::bind_layer_loop(module);
  lamina::bind_dense(module);
}
