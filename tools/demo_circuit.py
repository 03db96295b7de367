"""A head start for the demo model: an induction circuit in its first two layers.

A small transformer finds out by itself how to look things up in its context, but only after many
millions of tokens in which its loss hardly moves. The circuit it ends up with is well known
(Olsson et al., "In-context Learning and Induction Heads", 2022), so training starts from a faint
copy of it and needs minutes:

- layer 0 attends to the previous token and adds a part of that token's embedding to the residual
  stream: "the token before me was t";
- layer 1 asks "who comes after the token that I am?", attends there and copies what it finds.

Everything else starts at random, with the outputs of the unused heads and of the MLPs at zero.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

# Shape letters: V vocabulary, H hidden, D head.

# KV heads per layer that take part; the others are free from the start.
NUM_PLANTED_KV_HEADS = 3
# Chosen so that each step of the circuit beats the noise of the others without saturating.
POSITION_SCALE = 0.7
PREVIOUS_SCALE = 0.12
MATCH_SCALE = 1.8
COPY_SCALE = 0.5


def _rows_orthogonal_to(direction_H: Tensor) -> Tensor:
    """A random orthogonal [H, H] matrix, blind to `direction_H`."""
    matrix_HH = torch.nn.init.orthogonal_(torch.empty(len(direction_H), len(direction_H)))
    return matrix_HH - (matrix_HH @ direction_H)[:, None] * direction_H


@torch.no_grad()
def plant_induction_circuit(model: LlamaForCausalLM) -> None:
    """Overwrite weights of the fresh float32 `model`; draws from torch's global generator."""
    config = model.config
    head_size = config.head_dim
    queries_per_kv = config.num_attention_heads // config.num_key_value_heads
    layers = model.model.layers
    for layer in layers:
        layer.mlp.down_proj.weight.zero_()
        layer.self_attn.o_proj.weight.zero_()

    # All embeddings share one direction: the only thing that a head can use to find a position
    # whatever the token there is.
    embedding_VH = model.model.embed_tokens.weight
    shared_H = torch.nn.functional.normalize(torch.randn(config.hidden_size), dim=0)
    embedding_VH -= (embedding_VH @ shared_H)[:, None] * shared_H
    embedding_VH += shared_H * embedding_VH.norm(dim=-1).mean()

    # The rotary embedding turns a query at m and a key at n by m and n times each frequency; a key
    # that starts one step ahead agrees best with the query at n + 1.
    exponents = torch.arange(0, head_size, 2) / head_size
    frequencies = config.rope_parameters["rope_theta"] ** -exponents
    query_D = torch.cat([torch.ones(head_size // 2), torch.zeros(head_size // 2)])
    key_D = torch.cat([frequencies.cos(), frequencies.sin()])

    read_previous_HH = _rows_orthogonal_to(shared_H)
    write_previous_HH = _rows_orthogonal_to(shared_H)
    copy_HH = _rows_orthogonal_to(shared_H)
    first, second = layers[0].self_attn, layers[1].self_attn
    for kv_head in range(config.num_key_value_heads):
        kv = slice(kv_head * head_size, (kv_head + 1) * head_size)
        second.v_proj.weight[kv] = copy_HH[kv]
        planted = kv_head < NUM_PLANTED_KV_HEADS
        if planted:
            first.k_proj.weight[kv] = POSITION_SCALE * key_D[:, None] * shared_H
            first.v_proj.weight[kv] = read_previous_HH[kv]
            second.k_proj.weight[kv] = MATCH_SCALE * write_previous_HH[kv]
        for head in range(kv_head * queries_per_kv, (kv_head + 1) * queries_per_kv):
            q = slice(head * head_size, (head + 1) * head_size)
            second.o_proj.weight[:, q] = COPY_SCALE / queries_per_kv * copy_HH[kv].T
            if planted:
                first.q_proj.weight[q] = POSITION_SCALE * query_D[:, None] * shared_H
                first.o_proj.weight[:, q] = (
                    PREVIOUS_SCALE / queries_per_kv * write_previous_HH[kv].T
                )
                second.q_proj.weight[q] = MATCH_SCALE * read_previous_HH[kv]
