// Memory of mailboxes: whole pages, private to the process or to be shared with another one.
#pragma once

#include <cstddef>
#include <memory>

namespace lamina {

/// A mapping of at least `num_bytes` zero bytes. Throws std::runtime_error if the system has none.
class Memory {
 public:
  /// Of this process alone.
  static std::shared_ptr<Memory> make_private(size_t num_bytes);

  /// In a file without a name, whose size is sealed; `fd()` can be passed to another process.
  static std::shared_ptr<Memory> make_shared(size_t num_bytes);

  /// What another process made with `make_shared`; takes `fd`. Throws if it has another size, or
  /// could shrink under us.
  static std::shared_ptr<Memory> map_shared(int fd, size_t num_bytes);

  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  std::byte* data() const { return data_; }

  /// -1: private, or closed by `close_fd`.
  int fd() const { return fd_; }

  /// The mapping stays.
  void close_fd();

 private:
  Memory(std::byte* data, size_t num_bytes, int fd) : data_(data), num_bytes_(num_bytes), fd_(fd) {}

  std::byte* data_;
  size_t num_bytes_;
  int fd_;
};

}  // namespace lamina
