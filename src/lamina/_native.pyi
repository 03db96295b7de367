"""Lamina's native data plane (C++ in `native/`)."""

# --- core ---

def active_isa() -> str:
    """The instruction set level in use: portable, avx2, avx512 or avx512bf16.

    The environment variable LAMINA_ISA forces one. Raises ValueError if the machine lacks it.
    """

def available_isas() -> list[str]:
    """Levels that this machine can run, lowest first."""

class ThreadPool:
    """Threads that run native jobs together with the calling thread. Share one per process."""

    def __init__(self, num_threads: int, cores: list[int] = ...) -> None:
        """`cores`: pin thread i to cores[i] (thread 0 is the caller, which is not pinned)."""

    @property
    def num_threads(self) -> int: ...

# --- transport ---

# --- attention ---

# --- worker ---

# --- dense ---

_View = tuple[int, int, int, int, int, int]
"""Heads of a buffer's rows, in elements: (buffer, offset, row stride, head stride, heads, width).

A row of a buffer belongs to a token. Element d of head h of row t lies at offset + t * row stride +
h * head stride + d. Buffers count the program's arguments first, then its scratch buffers.
"""

def argmax_rows(
    element: str, data: int, num_rows: int, width: int, row_stride: int, isa: str | None = None
) -> tuple[list[int], list[float]]:
    """Index and value of each row's largest element: the first of equals, or the first NaN.

    `element`: bfloat16 or float32. `data`: an address; strides in elements; 0 < width < 2^31.
    """

class PackedLinear:
    """Weights [N, K] and biases of a linear in the native layout; owns its (huge) pages."""

    def __init__(self, element: str, num_outputs: int, num_inputs: int) -> None:
        """All zero. `element`: bfloat16 or float32. Raises MemoryError."""

    def set(
        self,
        first: int,
        weights: int,
        count: int,
        output_stride: int,
        input_stride: int,
        pool: ThreadPool,
    ) -> None:
        """Copy outputs [first, first + count) from address `weights`; strides in elements."""

    def set_bias(self, first: int, bias: list[float]) -> None:
        """Set the biases of outputs from `first` on; those never set are zero."""

    @property
    def num_outputs(self) -> int: ...
    @property
    def num_inputs(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

class DenseProgram:
    """Row-wise operations that run one after the other as one call. At most 64 buffers.

    All values are of the program's element type; all arithmetic is float32. Operands of one
    operation have the same heads and widths unless it says otherwise; outputs must not overlap
    inputs. Methods raise ValueError for a view of no buffer.
    """

    def __init__(self, element: str, num_arguments: int) -> None:
        """`element`: bfloat16 or float32."""

    def scratch(self, width: int) -> int:
        """A scratch buffer of `width` elements per row; returns its number."""

    def linear(self, x: _View, linear: int, out: _View, residual: _View | None = None) -> None:
        """out = x @ W^T + bias, then + residual; W and bias are bound linear number `linear`.

        One head each: x of K elements, out and residual of N.
        """

    def norm(self, x: _View, out: _View, weight: int, bias: int, eps: float, kind: str) -> None:
        """Normalize each head. `weight`, `bias`: bound vectors, -1 for none.

        `kind`: rms (round, then weight), rms_once (weight, then round) or layer.
        """

    def activation(self, x: _View, gate: _View | None, out: _View, name: str) -> None:
        """out = activation(x) * gate; silu, gelu_tanh, gelu or relu."""

    def rotary(self, x: _View, cos: _View, sin: _View, out: _View) -> None:
        """Rotate halves of each head's first R elements; cos and sin have one head of R."""

    def add(self, x: _View, other: _View | None, out: _View) -> None:
        """out = x + other, or a copy of x."""

class DenseWorkspace:
    """Threads and scratch memory that programs share; they run one at a time."""

    def __init__(self, pool: ThreadPool, isa: str | None = None) -> None:
        """`isa`: an instruction set level instead of the active one."""

class BoundDenseProgram:
    """A program with weights. Keeps what it was made of alive."""

    def __init__(
        self,
        program: DenseProgram,
        workspace: DenseWorkspace,
        linears: list[PackedLinear],
        vectors: list[list[float]],
    ) -> None:
        """Raises ValueError or IndexError if weights are missing or of another shape."""

    def run(self, num_rows: int, arguments: list[int]) -> None:
        """Run on rows at the arguments' addresses. Blocks, without the interpreter's lock."""
