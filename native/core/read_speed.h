// How fast this machine reads memory: the measure that attention is held against.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "core/memory.h"
#include "core/threads.h"

namespace lamina {

class MemoryReader {
 public:
  /// Takes and touches `num_bytes` of memory. Choose several times the size of the caches.
  MemoryReader(size_t num_bytes, std::shared_ptr<ThreadPool> pool);

  size_t size() const { return num_bytes_; }

  /// Read everything once, each thread a part of its own, front to back. Returns seconds.
  double read();

 private:
  size_t num_bytes_;
  std::shared_ptr<ThreadPool> pool_;
  HugeMemory memory_;
  uint64_t result_ = 0;  // so that no compiler leaves out the reading
};

}  // namespace lamina
