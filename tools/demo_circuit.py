"""A head start for the demo model: a lookup circuit in its first three layers.

A small transformer finds out by itself how to look things up in its context, but only after very
many examples in which its loss hardly moves. The circuit it ends up with is well known (Olsson et
al., "In-context Learning and Induction Heads", 2022), so training starts from a faint and noisy
copy of it and then needs minutes:

- layer 0: each KV head attends to one of the four tokens before, and writes a projection of it into
  a slot of the residual stream: "the token two before me was lantern";
- layers 1 and 2: a head compares a slot of the present token with a slot of the earlier ones, and
  copies what a slot holds where they agree: "what followed when lantern was three back?".

Which words should be compared when, and everything else, is left to training.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

# Shape letters: V vocabulary, H hidden, D head.

# Chosen so that a match beats the noise of the other terms without saturating the softmax.
POSITION_SCALE = 1.0
SLOT_SCALE = 0.2
MATCH_SCALE = 2.0
COPY_SCALE = 1.0
# A rotary pair that turns faster than the first (radians per token) can tell neighbours apart; one
# that turns slower than the second leaves a comparison over a hundred tokens undisturbed.
FAST_PAIR = 0.05
SLOW_PAIR = 0.008


# The layers whose attention is planted; the third only faintly, so it counts as free.
NUM_PLANTED_LAYERS = 2


class Lookup(NamedTuple):
    """A head that finds the tokens whose slot `key` equals the present token's slot `query`.

    Slot 0 is the token itself, slot i the token i before it; `value` is the slot that is copied.
    """

    layer: int
    kv_head: int
    query: int
    key: int
    value: int


LOOKUPS = (
    Lookup(1, 0, query=2, key=3, value=0),  # Mira is a | baker
    Lookup(1, 1, query=3, key=4, value=0),  # lantern is in the | lantern in the attic
    Lookup(1, 2, query=1, key=0, value=1),  # lantern is | red lantern
    Lookup(1, 3, query=2, key=0, value=4),  # lantern belongs to | Mira has a red lantern
    # What came next last time. These start faint: what layer 1 copies is louder than the slots.
    Lookup(2, 0, query=0, key=1, value=0),
    Lookup(2, 1, query=1, key=2, value=0),
)


def _blocks(direction_H: Tensor, head_size: int) -> list[Tensor]:
    """Orthonormal [D, H] projections onto disjoint subspaces, all blind to `direction_H`."""
    hidden_size = len(direction_H)
    matrix_HH = torch.nn.init.orthogonal_(torch.empty(hidden_size, hidden_size))
    matrix_HH -= (matrix_HH @ direction_H)[:, None] * direction_H
    return list(torch.split(matrix_HH, head_size))


def _plant(
    model: LlamaForCausalLM,
    layer: int,
    kv_head: int,
    *,
    query_DH: Tensor,
    key_DH: Tensor,
    value_DH: Tensor,
    output_DH: Tensor,
) -> None:
    """Write one KV head and all query heads of its group; the group's outputs add up to one."""
    attention = model.model.layers[layer].self_attn
    size, group = attention.head_dim, attention.num_key_value_groups
    attention.k_proj.weight[kv_head * size : (kv_head + 1) * size] = key_DH
    attention.v_proj.weight[kv_head * size : (kv_head + 1) * size] = value_DH
    for head in range(kv_head * group, (kv_head + 1) * group):
        attention.q_proj.weight[head * size : (head + 1) * size] = query_DH
        attention.o_proj.weight[:, head * size : (head + 1) * size] = output_DH.T / group


@torch.no_grad()
def plant_lookup_circuit(model: LlamaForCausalLM) -> None:
    """Overwrite weights of the fresh float32 `model`; draws from torch's global generator."""
    config = model.config
    size = config.head_dim
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.zero_()
        layer.self_attn.o_proj.weight.zero_()

    # All embeddings are equally long and share one direction: what a head uses to find a position
    # whatever the token there is.
    embedding_VH = model.model.embed_tokens.weight
    length = config.initializer_range * config.hidden_size**0.5
    shared_H = torch.nn.functional.normalize(torch.randn(config.hidden_size), dim=0)
    embedding_VH -= (embedding_VH @ shared_H)[:, None] * shared_H
    embedding_VH.copy_(length * (torch.nn.functional.normalize(embedding_VH, dim=-1) + shared_H))

    slots = _blocks(shared_H, size)
    token_DH = slots[0]
    speeds = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2) / size)

    # The rotary embedding turns the query at m by m times each speed and the key at n by n times.
    # A key that starts `offset` steps ahead agrees best with the query at n + offset.
    fast = (speeds > FAST_PAIR).float()
    query_D = torch.cat([fast, torch.zeros_like(fast)])
    for kv_head in range(config.num_key_value_heads):
        offset = kv_head + 1
        key_D = torch.cat([(offset * speeds).cos() * fast, (offset * speeds).sin() * fast])
        _plant(
            model,
            0,
            kv_head,
            query_DH=POSITION_SCALE * query_D[:, None] * shared_H,
            key_DH=POSITION_SCALE * key_D[:, None] * shared_H,
            value_DH=token_DH,
            output_DH=SLOT_SCALE * slots[offset],
        )

    slow_D = (speeds < SLOW_PAIR).float().repeat(2)
    for lookup in LOOKUPS:
        mix_DD = torch.nn.init.orthogonal_(torch.empty(size, size))
        compare_DD = MATCH_SCALE * slow_D[:, None] * mix_DD
        _plant(
            model,
            lookup.layer,
            lookup.kv_head,
            query_DH=compare_DD @ slots[lookup.query],
            key_DH=compare_DD @ slots[lookup.key],
            value_DH=slots[lookup.value],
            output_DH=COPY_SCALE * token_DH,
        )
