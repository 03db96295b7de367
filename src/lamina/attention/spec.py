"""What one attention layer computes: the contract between converter, workers and kernels."""

from __future__ import annotations

import hashlib

import msgspec


class AttentionSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One layer's attention, causal always. No weights: sink values travel beside the spec.

    For a query at position p, token t of the same sequence takes part when t <= p and, with a
    window, p - t < window. score = scale * q.k, then softcap * tanh(score / softcap) if set. A sink
    is one more score per query head, with a value vector of zeros (GPT-OSS).
    """

    layer: int
    num_query_heads: int
    num_kv_heads: int
    """Divides the query heads; query head h reads KV head h // (query heads / KV heads)."""
    head_dim_k: int
    """Size of q and k vectors."""
    head_dim_v: int
    """Size of v and output vectors."""
    scale: float
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False

    def __post_init__(self) -> None:
        assert self.num_query_heads % self.num_kv_heads == 0, (
            "query heads must be a multiple of KV heads"
        )
        assert self.window is None or self.window >= 1, "window counts the query's own token"

    @property
    def group_size(self) -> int:
        """Query heads per KV head (G)."""
        return self.num_query_heads // self.num_kv_heads

    def shard(self, kv_head_start: int, kv_head_stop: int) -> AttentionSpec:
        """The same layer for the KV heads in [start, stop) and their query heads."""
        num_kv_heads = kv_head_stop - kv_head_start
        return msgspec.structs.replace(
            self, num_kv_heads=num_kv_heads, num_query_heads=num_kv_heads * self.group_size
        )

    def kv_elements_per_token(self) -> int:
        """Elements of k and v that one token adds to the cache in this layer."""
        return self.num_kv_heads * (self.head_dim_k + self.head_dim_v)


def fingerprint(specs: tuple[AttentionSpec, ...], dtype: str) -> str:
    """A short digest of all layers' specs and the cache dtype; both ends of a link must agree."""
    payload = msgspec.msgpack.encode((specs, dtype))
    return hashlib.sha256(payload).hexdigest()[:32]
