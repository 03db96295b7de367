#include "transport/memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

namespace lamina {

namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

[[noreturn]] void throw_errno(const std::string& what, size_t num_bytes) {
  throw std::runtime_error("cannot " + what + " " + std::to_string(num_bytes) +
                           " bytes for a mailbox: " + std::strerror(errno));
}

std::byte* map(size_t num_bytes, int flags, int fd) {
  void* data = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
  return data == MAP_FAILED ? nullptr : static_cast<std::byte*>(data);
}

}  // namespace

std::shared_ptr<Memory> Memory::make_private(size_t num_bytes) {
  std::byte* data = map(num_bytes, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
  if (data == nullptr) throw_errno("allocate", num_bytes);
  return std::shared_ptr<Memory>(new Memory(data, num_bytes, -1));
}

std::shared_ptr<Memory> Memory::make_shared(size_t num_bytes) {
  const int fd = memfd_create("lamina-mailbox", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) throw_errno("share", num_bytes);
  std::byte* data = nullptr;
  if (ftruncate(fd, static_cast<off_t>(num_bytes)) == 0 && fcntl(fd, F_ADD_SEALS, kSeals) == 0) {
    data = map(num_bytes, MAP_SHARED, fd);
  }
  if (data == nullptr) {
    const int error = errno;
    close(fd);
    errno = error;
    throw_errno("share", num_bytes);
  }
  return std::shared_ptr<Memory>(new Memory(data, num_bytes, fd));
}

std::shared_ptr<Memory> Memory::map_shared(int fd, size_t num_bytes) {
  struct stat status;
  const bool fits = fstat(fd, &status) == 0 && static_cast<size_t>(status.st_size) == num_bytes &&
                    (fcntl(fd, F_GET_SEALS) & F_SEAL_SHRINK) != 0;
  std::byte* data = fits ? map(num_bytes, MAP_SHARED, fd) : nullptr;
  const int error = fits ? errno : EINVAL;
  close(fd);
  if (data == nullptr) {
    errno = error;
    throw_errno("map", num_bytes);
  }
  return std::shared_ptr<Memory>(new Memory(data, num_bytes, -1));
}

Memory::~Memory() {
  close_fd();
  munmap(data_, num_bytes_);
}

void Memory::close_fd() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

}  // namespace lamina
