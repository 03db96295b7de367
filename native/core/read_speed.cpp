#include "core/read_speed.h"

#include <atomic>
#include <cstring>
#include <utility>

#include "core/wait.h"

namespace lamina {
namespace {

constexpr size_t kUnit = 4096;

uint64_t sum(const std::byte* data, size_t num_bytes) {
  uint64_t sums[8] = {};
  for (size_t at = 0; at + sizeof sums <= num_bytes; at += sizeof sums) {
    uint64_t line[8];
    std::memcpy(line, data + at, sizeof line);
    for (int i = 0; i < 8; ++i) sums[i] += line[i];
  }
  uint64_t total = 0;
  for (uint64_t part : sums) total += part;
  return total;
}

}  // namespace

MemoryReader::MemoryReader(size_t num_bytes, std::shared_ptr<ThreadPool> pool)
    : num_bytes_(num_bytes / kUnit * kUnit),
      pool_(std::move(pool)),
      memory_(num_bytes_, *pool_, "measuring the read bandwidth") {
  pool_->run([&](int thread) {
    const Part part =
        equal_part(static_cast<int64_t>(num_bytes_ / kUnit), thread, pool_->num_threads());
    std::memset(memory_.data() + static_cast<size_t>(part.begin) * kUnit, 1,
                static_cast<size_t>(part.end - part.begin) * kUnit);
  });
}

double MemoryReader::read() {
  std::atomic<uint64_t> total{0};
  const double begin = monotonic_s();
  pool_->run([&](int thread) {
    const Part part =
        equal_part(static_cast<int64_t>(num_bytes_ / kUnit), thread, pool_->num_threads());
    total += sum(memory_.data() + static_cast<size_t>(part.begin) * kUnit,
                 static_cast<size_t>(part.end - part.begin) * kUnit);
  });
  const double end = monotonic_s();
  result_ += total;
  return end - begin;
}

}  // namespace lamina
