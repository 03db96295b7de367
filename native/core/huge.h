// Memory for weights, caches and scratch: aligned, zeroed, in huge pages where the system grants them.
#pragma once

#include <cstddef>
#include <utility>

namespace lamina {

/// Owns `bytes()` of zeroed memory, aligned to 64 bytes (2 MiB for large buffers). Movable.
class HugeBuffer {
 public:
  HugeBuffer() = default;
  /// Throws std::bad_alloc if the system has no such memory. Pages are touched by their first user.
  explicit HugeBuffer(size_t bytes);
  ~HugeBuffer();
  HugeBuffer(HugeBuffer&& other) noexcept { swap(other); }
  HugeBuffer& operator=(HugeBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  HugeBuffer(const HugeBuffer&) = delete;
  HugeBuffer& operator=(const HugeBuffer&) = delete;

  static constexpr size_t kHugePage = size_t{2} << 20;

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void swap(HugeBuffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(mapping_, other.mapping_);
    std::swap(mapped_bytes_, other.mapped_bytes_);
  }

  void* data_ = nullptr;
  size_t bytes_ = 0;
  void* mapping_ = nullptr;
  size_t mapped_bytes_ = 0;
};

}  // namespace lamina
