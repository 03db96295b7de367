"""What is measured: rows, and which of them fit into memory together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

GIB = 2**30
DEFAULT_ROWS = (
    "decode:1x256,decode:1x1024,decode:16x256,decode:16x1024,"
    "prefill:1x512,prefill:1x1024,prefill:4x512,decode:4x8192"
)
LEAVE_OUT_FIRST = ("transformers", "llama.cpp")
"""Peers to do without when memory is short, in this order: the slowest at long contexts first."""
_PREFILL_STAGGER_TOKENS = 128
"""Tokens that the first sequences decode while the last prompts are still computed, at most."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case: `batch` sequences with `context` tokens each."""

    kind: Literal["decode", "prefill"]
    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.kind} {self.batch}x{self.context}"

    def length(self, decode_steps: int) -> int:
        """Tokens of a sequence at the end of `decode_steps`, with room to spare."""
        return self.context + decode_steps + _PREFILL_STAGGER_TOKENS


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows that the same running subjects are asked for."""

    rows: tuple[Row, ...]
    subjects: tuple[str, ...]
    left_out: tuple[str, ...]
    """Subjects that memory has no room for."""

    @property
    def batch(self) -> int:
        return max(row.batch for row in self.rows)

    def length(self, decode_steps: int) -> int:
        return max(row.length(decode_steps) for row in self.rows)

    def kv_tokens(self, decode_steps: int) -> int:
        """Most tokens in the cache at a time."""
        return max(row.batch * row.length(decode_steps) for row in self.rows)


def parse_rows(text: str) -> list[Row]:
    """`decode:1x256,prefill:4x512` -> rows; ValueError says what is wrong."""
    rows = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(decode|prefill):([1-9][0-9]*)x([1-9][0-9]*)\s*", part)
        if match is None:
            raise ValueError(
                f"--rows must be a list such as decode:16x256,prefill:4x512, got {part!r}"
            )
        kind: Any = match.group(1)
        rows.append(Row(kind=kind, batch=int(match.group(2)), context=int(match.group(3))))
    return rows


def kv_bytes_per_token(config: dict[str, Any]) -> int:
    """Bytes of k and v in 16 bits, all layers."""
    heads = config["num_key_value_heads"] * config["head_dim"]
    return int(config["num_hidden_layers"] * 2 * heads * 2)


def weight_bytes(config: dict[str, Any]) -> int:
    """Bytes of a Qwen3 model's matrices in 16 bits, tied embeddings."""
    hidden, head = config["hidden_size"], config["head_dim"]
    attention = 2 * (config["num_attention_heads"] + config["num_key_value_heads"]) * head
    layer = hidden * (attention + 3 * config["intermediate_size"])
    return int(2 * (config["num_hidden_layers"] * layer + hidden * config["vocab_size"]))


def needed_bytes(subject: str, config: dict[str, Any], kv_bytes: int, prompt_bytes: int) -> int:
    """Roughly what a subject holds with `kv_bytes` of cache, `prompt_bytes` of them per sequence.

    Measured for 0.47 B parameters and rounded up.
    """
    base = {"transformers": 0.7, "vllm": 1.6, "llama.cpp": 0.5}.get(subject, 0.6)
    if subject.startswith("lamina-") and subject != "lamina-local":
        base += 0.3
        kv_bytes += prompt_bytes
    return int(base * GIB) + weight_bytes(config) + kv_bytes


def group_rows(
    rows: Sequence[Row],
    subjects: Sequence[str],
    config: dict[str, Any],
    *,
    decode_steps: int,
    memory_bytes: int,
) -> list[Group]:
    """Rows in order, in as few groups as memory allows; ValueError if even one row does not fit."""

    def fits(some_rows: Sequence[Row], some_subjects: Sequence[str]) -> bool:
        group = Group(rows=tuple(some_rows), subjects=(), left_out=())
        token = kv_bytes_per_token(config)
        kv = token * group.kv_tokens(decode_steps)
        prompt = token * group.length(decode_steps)
        needed = sum(needed_bytes(name, config, kv, prompt) for name in some_subjects)
        return needed <= memory_bytes

    groups: list[Group] = []
    for row in rows:
        if groups and not groups[-1].left_out and fits([*groups[-1].rows, row], subjects):
            groups[-1] = Group(rows=(*groups[-1].rows, row), subjects=tuple(subjects), left_out=())
            continue
        chosen = list(subjects)
        for name in LEAVE_OUT_FIRST:
            if not fits([row], chosen) and name in chosen:
                chosen.remove(name)
        if not fits([row], chosen):
            raise ValueError(
                f"{row} does not fit into {memory_bytes / GIB:.1f} GiB with {', '.join(chosen)}; "
                "give fewer --subjects or another --memory"
            )
        left_out = tuple(name for name in subjects if name not in chosen)
        groups.append(Group(rows=(row,), subjects=tuple(chosen), left_out=left_out))
    return groups
