"""How far a backend's attention may be from the float32 oracle. The one table, by cache dtype.

The oracle is fed the same rounded q, k and v; what remains is the rounding of the backend's own
partial results and of its output, relative to outputs of magnitude about 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """For `torch.testing.assert_close(..., atol=..., rtol=...)`."""

    atol: float
    rtol: float


ATTENTION_TOLERANCE = {
    torch.float32: Tolerance(atol=1e-5, rtol=1e-5),
    torch.float16: Tolerance(atol=4e-3, rtol=4e-3),
    torch.bfloat16: Tolerance(atol=3e-2, rtol=3e-2),
    # A cache of int8, against the oracle of the keys and values that it gives back; for narrower
    # dtypes of q and the output their own tolerance.
    torch.int8: Tolerance(atol=2e-3, rtol=2e-3),
}
