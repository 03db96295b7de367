#include "dense/program.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/wait.h"

namespace lamina::dense {
namespace {

constexpr size_t kAlignment = 256;
/// Multiplications (or a few element operations) below which one thread is faster than two.
constexpr double kWorkWorthThreads = 100e3;
constexpr double kWorkPerElement = 8.0;
constexpr int64_t kRowsToSplit = 192;

template <typename... F>
struct Overloaded : F... {
  using F::operator()...;
};
template <typename... F>
Overloaded(F...) -> Overloaded<F...>;

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

/// Lets all threads of a job pass when the last one has come.
class Barrier {
 public:
  explicit Barrier(int num_threads) : num_threads_(num_threads) {}

  void wait() {
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (num_waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
      num_waiting_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    Pacer pacer;
    while (phase_.load(std::memory_order_acquire) == phase) pacer.step();
  }

 private:
  int num_threads_;
  alignas(64) std::atomic<int> num_waiting_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

Rows rows_of(const View& view, char* const* buffers, size_t bytes) {
  if (view.buffer < 0) return {};
  return {buffers[view.buffer] + view.offset * static_cast<int64_t>(bytes), view.row_stride,
          view.head_stride, view.heads, view.width};
}

}  // namespace

int Program::add_scratch(int64_t width) {
  if (num_arguments_ + scratch_widths_.size() >= kMaxBuffers) {
    throw std::length_error("a program has at most 64 buffers; make several");
  }
  scratch_widths_.push_back(width);
  return num_arguments_ + static_cast<int>(scratch_widths_.size()) - 1;
}

void Program::check(const View& view, bool is_optional) const {
  if (is_optional && view.buffer == -1) return;
  const int num_buffers = num_arguments_ + static_cast<int>(scratch_widths_.size());
  if (view.buffer < 0 || view.buffer >= num_buffers || view.heads < 1 || view.width < 1) {
    throw std::invalid_argument("an operand is a view of no buffer of this program");
  }
}

void Program::add(Op op) {
  std::visit(Overloaded{[&](const LinearOp& o) { check(o.residual, true); },
                        [&](const NormOp&) {},
                        [&](const ActivationOp& o) { check(o.gate, true); },
                        [&](const RotaryOp& o) { check(o.cos), check(o.sin); },
                        [&](const AddOp& o) { check(o.other, true); }},
             op);
  std::visit([&](const auto& o) { check(o.x), check(o.out); }, op);
  ops_.push_back(op);
}

BoundProgram::BoundProgram(std::shared_ptr<const Program> program,
                           std::shared_ptr<Workspace> workspace,
                           std::vector<std::shared_ptr<const PackedLinear>> linears,
                           std::vector<std::vector<float>> vectors)
    : program_(std::move(program)),
      workspace_(std::move(workspace)),
      linears_(std::move(linears)),
      vectors_(std::move(vectors)),
      kernels_(kernels(workspace_->isa(), program_->element())) {
  const auto vector_of = [&](int index, int64_t width) -> const float* {
    if (index < 0) return nullptr;
    if (static_cast<int64_t>(vectors_.at(index).size()) != width) {
      throw std::invalid_argument("vector " + std::to_string(index) + " has another length");
    }
    return vectors_[index].data();
  };
  for (const Op& op : program_->ops()) {
    Step step{.op = &op};
    const auto reads = [&](const View& view) {
      if (view.buffer >= 0) step.reads |= uint64_t{1} << view.buffer;
    };
    std::visit(
        [&](const auto& o) {
          reads(o.x);
          step.writes = uint64_t{1} << o.out.buffer;
          step.work_per_row = kWorkPerElement * static_cast<double>(o.x.heads * o.x.width);
        },
        op);
    std::visit(Overloaded{[&](const LinearOp& o) {
                            const PackedLinear& linear = *linears_.at(o.linear);
                            if (linear.element() != program_->element() ||
                                linear.num_inputs() != o.x.width ||
                                linear.num_outputs() != o.out.width) {
                              throw std::invalid_argument("linear " + std::to_string(o.linear) +
                                                          " does not fit its operands");
                            }
                            step.linear = &linear;
                            step.work_per_row = static_cast<double>(o.x.width) * o.out.width;
                            thread_scratch_bytes_ = std::max(
                                thread_scratch_bytes_, kernels_.linear_scratch_bytes(o.x.width));
                            reads(o.residual);
                          },
                          [&](const NormOp& o) {
                            step.weight = vector_of(o.weight, o.x.width);
                            step.bias = vector_of(o.bias, o.x.width);
                          },
                          [&](const ActivationOp& o) { reads(o.gate); },
                          [&](const RotaryOp& o) { reads(o.cos), reads(o.sin); },
                          [&](const AddOp& o) { reads(o.other); }},
               op);
    steps_.push_back(step);
  }
}

void BoundProgram::run(int64_t num_rows, const std::vector<uintptr_t>& arguments) const {
  if (static_cast<int>(arguments.size()) != program_->num_arguments()) {
    throw std::invalid_argument("this program has " + std::to_string(program_->num_arguments()) +
                                " arguments");
  }
  if (num_rows <= 0) return;
  const std::lock_guard lock(workspace_->in_use_);
  ThreadPool& pool = workspace_->pool_;
  const size_t element = element_bytes(program_->element());
  const size_t thread_bytes = aligned(thread_scratch_bytes_);
  if (workspace_->threads_.bytes() < thread_bytes * pool.num_threads()) {
    workspace_->threads_ = HugeBuffer(thread_bytes * pool.num_threads());
  }
  size_t bytes = 0;
  for (int64_t width : program_->scratch_widths()) bytes += aligned(width * num_rows * element);
  if (workspace_->rows_.bytes() < bytes) workspace_->rows_ = HugeBuffer(bytes);

  std::vector<char*> buffers;
  for (uintptr_t address : arguments) buffers.push_back(reinterpret_cast<char*>(address));
  char* scratch = static_cast<char*>(workspace_->rows_.data());
  for (int64_t width : program_->scratch_widths()) {
    buffers.push_back(scratch);
    scratch += aligned(width * num_rows * element);
  }
  const auto is_shared = [&](const Step& step) {
    return step.work_per_row * static_cast<double>(num_rows) >= kWorkWorthThreads;
  };
  char* thread_scratch = static_cast<char*>(workspace_->threads_.data());
  if (pool.num_threads() == 1 || std::none_of(steps_.begin(), steps_.end(), is_shared)) {
    for (const Step& step : steps_) run_step(step, num_rows, buffers.data(), 0, 1, thread_scratch);
    return;
  }
  Barrier barrier(pool.num_threads());
  pool.run([&](int thread) {
    // Threads meet only where an operation needs what others may still be writing or reading.
    uint64_t written = 0, read = 0;
    bool any_shared = false;
    for (const Step& step : steps_) {
      const bool shared = is_shared(step);
      const bool conflicts = ((step.reads | step.writes) & written) || (step.writes & read);
      if (conflicts && (shared || any_shared)) {
        barrier.wait();
        written = read = 0;
        any_shared = false;
      }
      written |= step.writes;
      read |= step.reads;
      any_shared |= shared;
      if (!shared && thread != 0) continue;
      run_step(step, num_rows, buffers.data(), thread, shared ? pool.num_threads() : 1,
               thread_scratch + thread * thread_bytes);
    }
  });
}

void BoundProgram::run_step(const Step& step, int64_t num_rows, char* const* buffers, int thread,
                            int num_threads, void* scratch) const {
  const size_t bytes = element_bytes(program_->element());
  const auto view = [&](const View& v) { return rows_of(v, buffers, bytes); };
  const auto items = [&](const View& v) {
    return equal_part(num_rows * v.heads, thread, num_threads);
  };
  std::visit(
      Overloaded{
          [&](const LinearOp& o) {
            const PackedLinear& linear = *step.linear;
            const LinearJob job{view(o.x),     linear.data(), linear.num_inputs(),
                                linear.num_outputs(), linear.bias(), view(o.out),
                                view(o.residual)};
            Part rows{0, num_rows}, panels{0, linear.num_panels()};
            if (num_rows >= kRowsToSplit) {
              rows = equal_part(num_rows, thread, num_threads);
            } else {
              panels = equal_part(linear.num_panels(), thread, num_threads);
            }
            kernels_.linear(job, rows.begin, rows.end, panels.begin, panels.end, scratch);
          },
          [&](const NormOp& o) {
            const Part part = items(o.x);
            kernels_.norm({view(o.x), step.weight, step.bias, view(o.out), o.eps, o.kind},
                          part.begin, part.end);
          },
          [&](const ActivationOp& o) {
            const Part part = items(o.x);
            kernels_.activation({view(o.x), view(o.gate), view(o.out), o.activation}, part.begin,
                                part.end);
          },
          [&](const RotaryOp& o) {
            const Part part = items(o.x);
            kernels_.rotary({view(o.x), view(o.cos), view(o.sin), view(o.out)}, part.begin,
                            part.end);
          },
          [&](const AddOp& o) {
            const Part part = items(o.x);
            kernels_.add({view(o.x), view(o.other), view(o.out)}, part.begin, part.end);
          }},
      *step.op);
}

}  // namespace lamina::dense
