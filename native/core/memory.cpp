#include "core/memory.h"

#include <linux/mempolicy.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <limits>
#include <mutex>
#include <vector>

namespace lamina {
namespace {

constexpr size_t kUnknown = std::numeric_limits<size_t>::max();

/// The first number in a file; kUnknown if there is none ("max", no such file).
size_t read_number(const std::string& path) {
  std::ifstream file(path);
  size_t value = 0;
  return file >> value ? value : kUnknown;
}

size_t meminfo_available() {
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  size_t kibibytes = 0;
  while (file >> key >> kibibytes) {
    std::getline(file, unit);
    if (key == "MemAvailable:") return kibibytes << 10;
  }
  return kUnknown;
}

/// What the control group of a container leaves; page cache that it counts as used can be dropped.
size_t control_group_available() {
  const std::string folder = "/sys/fs/cgroup/";
  const size_t limit = read_number(folder + "memory.max");
  const size_t used = read_number(folder + "memory.current");
  if (limit == kUnknown || used == kUnknown) return kUnknown;
  std::ifstream file(folder + "memory.stat");
  std::string key;
  size_t value = 0, cached = 0;
  while (file >> key >> value) {
    if (key == "inactive_file" || key == "active_file") cached += value;
  }
  const size_t fixed = used - std::min(used, cached);
  return limit - std::min(limit, fixed);
}

/// Numbers of a list such as "0-3,8".
std::vector<int> parse_list(std::istream& text) {
  std::vector<int> numbers;
  int first = 0;
  while (text >> first) {
    int last = first;
    if (text.peek() == '-') {
      text.get();
      text >> last;
    }
    for (int number = first; number <= last; ++number) numbers.push_back(number);
    if (text.peek() == ',') text.get();
  }
  return numbers;
}

/// Nodes with a core that any thread of the pool may run on; empty when the machine has one node.
std::vector<int> nodes_of(ThreadPool& pool) {
  std::ifstream online("/sys/devices/system/node/online");
  const std::vector<int> nodes = parse_list(online);
  if (nodes.size() < 2) return {};
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  std::mutex mutex;
  pool.run([&](int) {
    cpu_set_t mine;
    CPU_ZERO(&mine);
    sched_getaffinity(0, sizeof mine, &mine);
    const std::lock_guard lock(mutex);
    CPU_OR(&allowed, &allowed, &mine);
  });
  std::vector<int> used;
  for (int node : nodes) {
    std::ifstream list("/sys/devices/system/node/node" + std::to_string(node) + "/cpulist");
    const std::vector<int> cores = parse_list(list);
    const auto is_allowed = [&](int core) {
      return core < CPU_SETSIZE && CPU_ISSET(static_cast<size_t>(core), &allowed);
    };
    if (std::any_of(cores.begin(), cores.end(), is_allowed)) used.push_back(node);
  }
  return used;
}

/// Let pages come from these nodes, in turn if there are several. Other nodes help out when they
/// are full; a system that refuses policies places pages where they are touched first.
void place(void* data, size_t num_bytes, const std::vector<int>& nodes) {
  if (nodes.empty()) return;
  constexpr int kBits = 64;
  std::vector<unsigned long> mask(static_cast<size_t>(nodes.back() / kBits) + 1);
  for (int node : nodes) mask[static_cast<size_t>(node / kBits)] |= 1UL << (node % kBits);
  const int mode = nodes.size() == 1 ? MPOL_PREFERRED : MPOL_INTERLEAVE;
  syscall(SYS_mbind, data, num_bytes, mode, mask.data(), mask.size() * kBits + 1, 0);
}

std::string in_gib(size_t num_bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f GiB", static_cast<double>(num_bytes) / (1 << 30));
  return text;
}

}  // namespace

size_t available_memory_bytes() { return std::min(meminfo_available(), control_group_available()); }

HugeMemory::HugeMemory(size_t num_bytes, ThreadPool& pool, const std::string& purpose) {
  const size_t available = available_memory_bytes();
  if (num_bytes > available) {
    throw MemoryShortage("cannot allocate " + in_gib(num_bytes) + " for " + purpose +
                         ": this machine has " + in_gib(available) + " available");
  }
  try {
    buffer_ = HugeBuffer(std::max(num_bytes, HugeBuffer::kHugePage));
  } catch (const std::bad_alloc&) {
    throw MemoryShortage("cannot allocate " + in_gib(num_bytes) + " for " + purpose +
                         ": the system refuses the address space");
  }
  place(buffer_.data(), buffer_.bytes(), nodes_of(pool));
}

}  // namespace lamina
