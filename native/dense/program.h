// A sequence of row-wise operations that runs as one call: a part of a model's stage.
//
// Operations read and write views of buffers. A buffer is an argument (memory of the caller) or
// scratch (memory of the workspace); both are row-major, one row per token.
#pragma once

#include <memory>
#include <mutex>
#include <variant>
#include <vector>

#include "dense/kernels.h"
#include "dense/packed.h"

namespace lamina::dense {

/// Heads of a buffer's rows, in elements; see Rows.
struct View {
  int buffer = -1;  // -1: no such operand
  int64_t offset = 0;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
  int64_t heads = 0;
  int64_t width = 0;
};

struct LinearOp {
  View x, out, residual;
  int linear;  // index into the bound linears
};
struct NormOp {
  View x, out;
  int weight, bias;  // indices into the bound vectors, or -1
  float eps;
  NormKind kind;
};
struct ActivationOp {
  View x, gate, out;
  Activation activation;
};
struct RotaryOp {
  View x, cos, sin, out;
};
struct AddOp {
  View x, other, out;
};
using Op = std::variant<LinearOp, NormOp, ActivationOp, RotaryOp, AddOp>;

/// The operations without weights. Complete before it is bound; then read only.
class Program {
 public:
  Program(Element element, int num_arguments) : element_(element), num_arguments_(num_arguments) {}

  /// A scratch buffer of `width` elements per row; returns its number, after the arguments'.
  /// Throws std::length_error beyond kMaxBuffers buffers.
  int add_scratch(int64_t width);
  /// Throws std::invalid_argument for a view of no buffer.
  void add(Op op);

  static constexpr int kMaxBuffers = 64;

  Element element() const { return element_; }
  int num_arguments() const { return num_arguments_; }
  const std::vector<Op>& ops() const { return ops_; }
  const std::vector<int64_t>& scratch_widths() const { return scratch_widths_; }

 private:
  void check(const View& view, bool is_optional = false) const;

  Element element_;
  int num_arguments_;
  std::vector<Op> ops_;
  std::vector<int64_t> scratch_widths_;
};

/// Threads and scratch memory that programs share. One program runs at a time; others wait.
class Workspace {
 public:
  /// `pool` must outlive the workspace.
  Workspace(ThreadPool& pool, Isa isa) : pool_(pool), isa_(isa) {}

  ThreadPool& pool() { return pool_; }
  Isa isa() const { return isa_; }

 private:
  friend class BoundProgram;

  ThreadPool& pool_;
  Isa isa_;
  std::mutex in_use_;
  HugeBuffer rows_;
  HugeBuffer threads_;
};

/// A program with the weights of one stage.
class BoundProgram {
 public:
  /// Throws std::invalid_argument if an operation names weights that are not there or do not fit.
  BoundProgram(std::shared_ptr<const Program> program, std::shared_ptr<Workspace> workspace,
               std::vector<std::shared_ptr<const PackedLinear>> linears,
               std::vector<std::vector<float>> vectors);

  /// Runs on the workspace's threads; blocks until done. arguments: one address per argument.
  void run(int64_t num_rows, const std::vector<uintptr_t>& arguments) const;

 private:
  struct Step {
    const Op* op;
    const PackedLinear* linear = nullptr;
    const float* weight = nullptr;
    const float* bias = nullptr;
    double work_per_row = 0;
    uint64_t reads = 0;  // a bit per buffer
    uint64_t writes = 0;
  };

  void run_step(const Step& step, int64_t num_rows, char* const* buffers, int thread,
                int num_threads, void* scratch) const;

  std::shared_ptr<const Program> program_;
  std::shared_ptr<Workspace> workspace_;
  std::vector<std::shared_ptr<const PackedLinear>> linears_;
  std::vector<std::vector<float>> vectors_;
  std::vector<Step> steps_;
  const Kernels& kernels_;
  size_t thread_scratch_bytes_ = 0;
};

}  // namespace lamina::dense
