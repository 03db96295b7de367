"""Lamina's native data plane (C++ in `native/`)."""

from collections.abc import Callable, Sequence

from torch import Tensor
from typing_extensions import Buffer

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

    def grow(self, num_threads: int, cores: list[int] = ...) -> None:
        """Give a pool of one thread, made ahead of a fork, its others. No job may run meanwhile.

        Raises RuntimeError for a pool that has several.
        """

    @property
    def num_threads(self) -> int: ...

_Mailboxes = tuple[int, int, int, int, int, int, int, int]

# --- transport ---

PACER_YIELD_S: float
"""Seconds that a wait yields the core before it sleeps."""

class Outbox:
    """The sending end of a native mailbox. Belongs to its link, which must outlive it."""

    @property
    def capacity_bytes(self) -> int: ...
    def has_room(self) -> bool: ...
    def post(self, seq: int, deadline: float, *parts: int) -> None:
        """Send memory. `parts`: address and length of each part in turn, at most 16 parts.

        Blocks and raises as `lamina.transport.mailbox.Outbox.post`.
        """

class Inbox:
    """The receiving end of a native mailbox. Belongs to its link, which must outlive it."""

    @property
    def capacity_bytes(self) -> int: ...
    def wait(self, seq: int, deadline: float, num_bytes: int | None) -> tuple[int, int]:
        """The slot (0 or 1) that message `seq` lies in, and its length.

        Blocks and raises as `lamina.transport.mailbox.Inbox.wait`.
        """

    def holds(self, seq: int) -> bool:
        """Whether message `seq` is here, before any other that was not discarded. Never blocks."""

    def slot(self, index: int) -> Tensor:
        """The memory of a slot: uint8 [capacity_bytes], aligned to 64 bytes, kept alive by it."""

class Link:
    """A link of any native transport. Errors as `lamina.transport.mailbox.Link`."""

    @property
    def peer(self) -> str: ...
    def outbox(self, mailbox: int, capacity_bytes: int) -> Outbox: ...
    def inbox(self, mailbox: int, capacity_bytes: int) -> Inbox: ...
    def fail(self, reason: str) -> None: ...
    def close(self) -> None: ...

def wait_any(awaited: Sequence[tuple[Inbox, int]], deadline: float) -> int:
    """As `lamina.transport.native.wait_any`."""

class InprocLink(Link):
    """One end of a link within this process; made by `inproc_pair`."""

class ShmLink(Link):
    """A link between two processes of this machine."""

    def __init__(self, fd: int, peer: str, yield_s: float) -> None:
        """Takes over `fd`, a connected Unix stream socket.

        `yield_s`: how long a wait yields the core before it sleeps.
        """

class TcpLink(Link):
    """A link over a stream socket."""

    def __init__(self, fd: int, peer: str, version: int, busy_poll_s: float) -> None:
        """Takes over `fd`, a connected stream socket; `version` is that of the protocol.

        `busy_poll_s`: how long a wait looks and yields the core before it sleeps.
        """

class FaultyLink(Link):
    """Another link with the faults of `lamina.transport.faulty`."""

    def __init__(self, link: Link) -> None: ...
    def inject(
        self, kind: str, mailbox: int | None, after: int, count: int | None, delay_s: float
    ) -> None: ...
    def clear(self) -> None: ...

def inproc_pair(
    name_a: str, name_b: str, pump_b: Callable[[], None] | None
) -> tuple[InprocLink, InprocLink]:
    """As `lamina.transport.inproc.inproc_pair`."""

def ping(
    outbox: Outbox,
    inbox: Inbox,
    first_seq: int,
    count: int,
    num_bytes: int,
    check: bool,
    timeout_s: float,
) -> list[float]:
    """Send `count` messages one by one, each after the answer to the one before.

    `check` compares every byte of every answer (RuntimeError: it arrived changed), `timeout_s` is
    the deadline of each round trip. Returns the seconds that each took.
    """

def pong(
    inbox: Inbox,
    outbox: Outbox,
    first_seq: int,
    count: int,
    num_bytes: int,
    check: bool,
    timeout_s: float,
) -> None:
    """The other side of `ping`: answers each message with its own bytes."""

def bare_ping(fd: int, count: int, num_bytes: int, yields: bool) -> list[float]:
    """As `ping` over a connected socket in blocking mode without mailboxes.

    `yields`: wait as the links do; otherwise in blocking calls. An empty message is one byte.
    """

def bare_pong(fd: int, count: int, num_bytes: int, yields: bool) -> None:
    """The other side of `bare_ping`."""

# --- attention ---

class LayerSpec:
    """One layer's attention of the heads of a lane, as `lamina.attention.spec` defines it."""

    def __init__(
        self,
        *,
        query_heads: int,
        kv_heads: int,
        head_dim_k: int,
        head_dim_v: int,
        scale: float,
        window: int,
        softcap: float,
        sinks: list[float],
    ) -> None:
        """`window` and `softcap`: 0 is none. `sinks`: one per query head of all lanes, or empty."""

def page_bytes(layers: list[LayerSpec], cache_dtype: str, page_tokens: int) -> int:
    """Bytes of one page over all layers, padding and scales included."""

def available_memory_bytes() -> int:
    """Bytes that this process can still commit: the machine's and its control group's least."""

class MemoryReader:
    """Measures how fast the pool's threads read memory."""

    def __init__(self, num_bytes: int, pool: ThreadPool) -> None:
        """Takes and touches the memory: several times the caches. Raises CapacityError."""

    @property
    def size(self) -> int: ...
    def read(self) -> float:
        """Read all of it once, each thread its part; the seconds that took."""

class StepSchedule:
    """The work of one step, followed by all its layers. May outlive its executor's next `begin`."""

    @property
    def num_stored_rows(self) -> int: ...
    @property
    def num_attending_rows(self) -> int: ...
    @property
    def is_partial(self) -> bool: ...
    @property
    def is_over(self) -> bool:
        """No layer is served any more."""

    def revoke(self, lane: int) -> None:
        """Store nothing more in a lane: its pages are others' from now on."""

    def follow(self, step: StepSchedule) -> None:
        """Let a `LayerLoop` serve no layer of this step before that of `step`."""

class AttentionExecutor:
    """The native calls of a layer. Addresses are of contiguous memory in the model's dtype.

    A attending and N stored rows of all lanes, Hq and Hkv heads of a lane, Dk and Dv vector sizes.
    Calls release the GIL; one thread at a time.
    """

    @property
    def num_layers(self) -> int: ...
    def attend_cached(self, step: StepSchedule, layer: int, q: int) -> None:
        """Attend over committed tokens. q [A, Hq, Dk] stays unchanged until `finish` returns."""

    def finish(self, step: StepSchedule, layer: int, k: int, v: int, out: int) -> None:
        """Append k [N, Hkv, Dk] and v [N, Hkv, Dv], attend to them, write out [A, Hq, Dv].

        Of a partial step out is float32, and followed by the LSE [A, Hq].
        """

class PagedAttention(AttentionExecutor):
    """Keys and values in pages of this machine's memory, and attention over them."""

    def __init__(
        self,
        layers: list[LayerSpec],
        dtype: str,
        cache_dtype: str,
        num_pages: int,
        page_tokens: int,
        pool: ThreadPool,
        isa: str = ...,
    ) -> None:
        """`isa`: a level instead of the process's. Raises CapacityError: not enough memory."""

    def begin(
        self,
        num_attending: Buffer,
        num_stored: Buffer,
        context_tokens: Buffer,
        first_position: Buffer,
        heads: Buffer,
        num_pages: Buffer,
        pages: Buffer,
        is_partial: bool,
    ) -> StepSchedule:
        """Decide a step's work. One entry per lane, but for `pages`: those of all lanes in order.

        int32, `context_tokens` and `first_position` int64. `heads`: which group of heads (of a
        lane's size) of the model the lane has. Copied; the pages must hold context and stored
        tokens and stay the lanes' own until the step is over or the lane is revoked.
        """

# --- worker ---

_UnitSizes = tuple[int, int, int, int, int, int]
"""Of one head unit in a layer: bytes per row of q, k, v and out; query heads; size of v vectors."""

_Piece = tuple[int, int, int, int]
"""(first row, rows, first head unit, head units)"""

class ExecutorEnd:
    """The model worker's end of a link: packs q, k and v into mailbox slots, unpacks outputs.

    Addresses are those of contiguous tensors [T, heads, size] that cover all rows of the step.
    Calls block at most until `deadline` (`time.monotonic()`) and raise TransportErrors.
    """

    def __init__(
        self,
        link: Link,
        out_link: Link,
        layers: Sequence[_UnitSizes],
        num_units: int,
        page_units: int,
        mailboxes: Sequence[_Mailboxes],
    ) -> None:
        """
        Args:
            out_link: where outputs come from; `link` unless another replica's executor sends them.
            num_units: head units of every row.
            page_units: head units of each of the executor's lanes.
            mailboxes: `lamina.transport.topology.StepMailboxes` per micro-batch.
        """

    def begin(
        self,
        micro_batch: int,
        attending: Sequence[_Piece],
        stored: Sequence[_Piece],
        is_partial: bool,
    ) -> None:
        """What of the next step attends here and what is kept here, in the order of the plan.

        Raises ValueError for a piece that is not of whole lanes.
        """

    def post_q(
        self, micro_batch: int, layer: int, number: int, q_address: int, deadline: float
    ) -> None: ...
    def post_kv(
        self,
        micro_batch: int,
        layer: int,
        number: int,
        k_address: int,
        v_address: int,
        deadline: float,
    ) -> None: ...
    def attends_whole(self, micro_batch: int, num_rows: int) -> bool:
        """Whether all units of all rows attend here: payloads are the tensors themselves."""

    def has_out(self, micro_batch: int, number: int) -> bool:
        """Whether the output is here or none will come. Never blocks."""

    def out_inbox(self, micro_batch: int) -> Inbox:
        """The mailbox of the outputs. Belongs to its link."""

    def wait_out(self, micro_batch: int, layer: int, number: int, deadline: float) -> int:
        """Address of the output in the mailbox; valid until the next wait."""

    def collect_out(
        self, micro_batch: int, layer: int, number: int, out_address: int, deadline: float
    ) -> None:
        """Wait for the output and copy it to its rows and heads of [T, heads, size]."""

class ShareMerger:
    """Merges the outputs of executors that attend to different tokens of the same rows."""

    def __init__(
        self, layers: Sequence[_UnitSizes], num_units: int, dtype: str, num_micro_batches: int
    ) -> None:
        """`dtype`: of the merged output: float32, float16 or bfloat16."""

    def begin(self, micro_batch: int, num_rows: int, ends: Sequence[ExecutorEnd]) -> None:
        """The next step: all ends with partial outputs, which have begun it and outlive it."""

    def collect(
        self, micro_batch: int, layer: int, number: int, out_address: int, deadline: float
    ) -> None:
        """Wait for all outputs and write what they merge to at its place in [T, heads, size]."""

class LayerLoop:
    """Serves all layers of the steps in progress without the interpreter."""

    def __init__(
        self,
        executor: AttentionExecutor,
        plans: Inbox,
        channels: Sequence[tuple[Sequence[tuple[Inbox, Inbox, Outbox]], Outbox, int, int]],
        step_deadline_s: float,
    ) -> None:
        """Mailboxes and their links must outlive it.

        Args:
            plans: the mailbox whose next message ends `serve`.
            channels: for each its mailboxes for q, k and v, and the output at every replica, that
                of layer 0 first; that for reports; its first layer, and how many layers on its next
                one is.
        """

    def add(self, channel: int, number: int, first_message: int, schedule: StepSchedule) -> None:
        """Serve a step: message numbers from `first_message` on, its report's is `number`.

        A step of the same channel that is still in progress is forgotten; if it only stores, it is
        served as far as its messages still come.
        """

    def serve(self, next_plan: int, wake_at: float) -> bool:
        """Serve until plan number `next_plan` is here (True) or nothing is to do at `wake_at`."""

    def pump(self) -> None:
        """Serve the next message, which must be here: the other end runs in this thread."""

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
