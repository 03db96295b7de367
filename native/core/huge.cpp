#include "core/huge.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace lamina {
HugeBuffer::HugeBuffer(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  // A large buffer begins on a huge page: mapped with room to round its address up.
  const bool is_large = bytes >= kHugePage;
  mapped_bytes_ = is_large ? bytes + kHugePage : bytes;
  mapping_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping_ == MAP_FAILED) {
    mapping_ = nullptr;
    throw std::bad_alloc();
  }
  data_ = mapping_;
  if (!is_large) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(mapping_);
  data_ = reinterpret_cast<void*>((address + kHugePage - 1) / kHugePage * kHugePage);
  madvise(data_, bytes, MADV_HUGEPAGE);  // a wish: without it the buffer is only slower
}

HugeBuffer::~HugeBuffer() {
  if (mapping_ != nullptr) munmap(mapping_, mapped_bytes_);
}

}  // namespace lamina
