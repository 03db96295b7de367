"""Lamina's native data plane (C++ in `native/`)."""

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

    @property
    def num_threads(self) -> int: ...

# --- transport ---

# --- attention ---

class LayerSpec:
    """One layer's attention of an executor's own heads, as `lamina.attention.spec` defines it."""

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
        """`window` and `softcap`: 0 is none. `sinks`: one per query head, or empty."""

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
    def num_rows(self) -> int: ...
    @property
    def num_attending_rows(self) -> int: ...

class AttentionExecutor:
    """The native calls of a layer. Addresses are of contiguous memory in the model's dtype.

    A attending rows, N rows, Hq and Hkv query and KV heads, Dk and Dv sizes of k and v vectors.
    Calls release the GIL; one thread at a time.
    """

    @property
    def num_layers(self) -> int: ...
    def attend_cached(self, step: StepSchedule, layer: int, q: int) -> None:
        """Attend over committed tokens. q [A, Hq, Dk] stays unchanged until `finish` returns."""

    def finish(self, step: StepSchedule, layer: int, k: int, v: int, out: int) -> None:
        """Append k [N, Hkv, Dk] and v [N, Hkv, Dv], attend to them, write out [A, Hq, Dv]."""

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
        num_rows: Buffer,
        context_tokens: Buffer,
        attends: Buffer,
        num_pages: Buffer,
        pages: Buffer,
    ) -> StepSchedule:
        """Decide a step's work. One entry per span, but for `pages`: those of all spans in order.

        int32, `context_tokens` int64. Copied; the pages must hold context and new tokens and stay
        the spans' own until the step is over.
        """

    def attend_share(
        self,
        layer: int,
        pages: Buffer,
        begin: int,
        end: int,
        first_position: int,
        num_rows: int,
        q: int,
        out: int,
        lse: int,
    ) -> None:
        """Attend over stored tokens [begin, end) of one sequence (`pages`), without sinks.

        q [R, Hq, Dk] for rows from `first_position` on; writes out [R, Hq, Dv] and lse [R, Hq]
        (natural logarithm), float32.
        """

# --- worker ---

# --- dense ---
