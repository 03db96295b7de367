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
