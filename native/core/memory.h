// The memory of a KV cache: as large as asked for or refused, near the threads that use it.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#include "core/huge.h"
#include "core/threads.h"

namespace lamina {

/// The machine cannot give the memory; becomes lamina.errors.CapacityError in Python.
class MemoryShortage : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Bytes that this process can still commit: the least of the machine's and its control group's.
size_t available_memory_bytes();

/// A range of addresses aligned to 2 MiB. Nothing is committed until it is touched, then in huge
/// pages where the system grants them. Freed on destruction.
class HugeMemory {
 public:
  /// On machines with several NUMA nodes the memory comes from the nodes whose cores the pool's
  /// threads may use. `purpose` names the use in error messages.
  /// Throws MemoryShortage if the machine has less than `num_bytes` available now.
  HugeMemory(size_t num_bytes, ThreadPool& pool, const std::string& purpose);

  std::byte* data() const { return static_cast<std::byte*>(buffer_.data()); }
  size_t size() const { return buffer_.bytes(); }

 private:
  HugeBuffer buffer_;
};

}  // namespace lamina
