"""What a model costs per step, sequence and token: parameters, FLOPs and bytes.

A *row* is one token of a step. *Slices* are everything but the attention op; *attention* is that op
and the reading of the cache. FLOPs count multiplications and additions of matrices; norms, rotary
embeddings, activations and softmax are left out (well below 1 % of a real model's).
"""

from __future__ import annotations

import msgspec


class LayerCost(msgspec.Struct, frozen=True, kw_only=True):
    """One attention op and the part of the slices that belongs to its layer."""

    query_heads: int
    kv_heads: int
    head_dim_k: int
    head_dim_v: int
    window: int | None = None
    """Tokens that a row attends to at most, itself included; None: all."""
    weight_params: int
    """All parameters: of every expert, with norms and biases."""
    active_params_per_token: int
    """Elements of the matrices that one row is multiplied with."""
    activations_per_token: int
    """Elements that those matrices read and write for one row."""
    num_experts: int = 0
    """Routed experts; 0: a dense layer."""
    experts_per_token: int = 0
    params_per_expert: int = 0
    latent_rank: int | None = None
    """MLA: elements of a token's compressed k and v, shared by all heads, without the rotary part.
    The heads above are those of k and v expanded, which is what the engine keeps."""
    latent_rope_dim: int = 0
    """MLA: elements of a token's rotary key, shared by all heads."""
    values_are_keys: bool = False
    """v is a part of k, so that a token is kept once (see `ModelCost.compressed`)."""

    @property
    def kv_elements_per_token(self) -> int:
        """k and v of one token."""
        v = 0 if self.values_are_keys else self.head_dim_v
        return self.kv_heads * (self.head_dim_k + v)

    @property
    def hop_elements_per_row(self) -> int:
        """q, k, v and the attention's output of one row."""
        q_out = self.query_heads * (self.head_dim_k + self.head_dim_v)
        return q_out + self.kv_elements_per_token

    def attended(self, context: float) -> float:
        """Tokens that a row at this context length attends to."""
        return context if self.window is None else min(context, self.window)

    def experts_touched(self, rows: float) -> float:
        """Expected number of routed experts that at least one of `rows` goes to, if each row
        chooses its experts evenly and by itself."""
        if not self.num_experts:
            return 0.0
        miss: float = (1.0 - self.experts_per_token / self.num_experts) ** rows
        return self.num_experts * (1.0 - miss)

    def params_touched(self, rows: float) -> float:
        """Expected number of parameters that a step of `rows` reads."""
        untouched = self.num_experts - self.experts_touched(rows)
        return self.weight_params - untouched * self.params_per_expert


class ModelCost(msgspec.Struct, frozen=True, kw_only=True):
    """A whole model."""

    name: str
    architecture: str
    """The config's `model_type`."""
    layers: tuple[LayerCost, ...]
    hidden_size: int
    vocab_size: int
    embedding_params: int
    """Tables that are looked up: tokens, and positions where those are learned."""
    head_params: int
    """The matrix that makes the logits; the token table itself where `tied`."""
    other_params: int
    """What belongs to no layer: final norm, bias of the head."""
    tied: bool
    bytes_per_param: float = 2.0
    """Of weights."""
    bytes_per_element: float = 2.0
    """Of activations, k and v."""

    @property
    def num_params(self) -> int:
        """Every parameter once."""
        head = 0 if self.tied else self.head_params
        layers = sum(layer.weight_params for layer in self.layers)
        return layers + self.embedding_params + head + self.other_params

    @property
    def active_params_per_token(self) -> int:
        """Elements of all matrices that one row is multiplied with, the head's included."""
        return sum(layer.active_params_per_token for layer in self.layers) + self.head_params

    def weight_bytes(self, bytes_per_param: float | None = None) -> float:
        """Memory for the weights."""
        return self.num_params * (self.bytes_per_param if bytes_per_param is None
                                  else bytes_per_param)  # fmt: skip

    def slice_flops(self, rows: float, logit_rows: float | None = None) -> float:
        """FLOPs of all slices of a step.

        Args:
            logit_rows: rows whose logits are needed (of a prompt at most the last); None: all.
        """
        layers = sum(layer.active_params_per_token for layer in self.layers)
        head = self.head_params * (rows if logit_rows is None else logit_rows)
        return 2.0 * (rows * layers + head)

    def slice_bytes(self, rows: float, logit_rows: float | None = None) -> float:
        """Bytes that the slices of a step move: weights (of experts, those expected to be
        touched) once, activations in and out of every matrix."""
        logits = rows if logit_rows is None else logit_rows
        params = sum(layer.params_touched(rows) for layer in self.layers)
        params += self.head_params + self.other_params
        elements = rows * sum(layer.activations_per_token for layer in self.layers)
        elements += logits * (self.hidden_size + self.vocab_size)
        looked_up = rows * self.hidden_size
        return (params + looked_up) * self.bytes_per_param + elements * self.bytes_per_element

    def attention_flops(self, context: float) -> float:
        """FLOPs of the attention ops of all layers for one row.

        Args:
            context: tokens of the sequence up to and with the row.
        """
        return sum(
            2.0 * layer.query_heads * (layer.head_dim_k + layer.head_dim_v)
            * layer.attended(context)
            for layer in self.layers
        )  # fmt: skip

    def attention_bytes(self, context: float) -> float:
        """Bytes of the cache that attention reads for one sequence in one step, all layers."""
        return self.bytes_per_element * sum(
            layer.kv_elements_per_token * layer.attended(context) for layer in self.layers
        )

    @property
    def kv_bytes_per_token(self) -> float:
        """Memory for k and v of one token, all layers."""
        return self.bytes_per_element * sum(x.kv_elements_per_token for x in self.layers)

    def kv_bytes(self, context: float) -> float:
        """Memory for k and v of one sequence of `context` tokens. Tokens that have left a layer's
        window count: a page holds the same tokens of every layer."""
        return self.kv_bytes_per_token * context

    @property
    def hop_bytes_per_row(self) -> float:
        """q, k, v and outputs of one row over all layers: what crosses to attention and back."""
        return self.bytes_per_element * sum(x.hop_elements_per_row for x in self.layers)

    def compressed(self) -> ModelCost:
        """The same with MLA's k and v kept compressed (the up-projections are applied to q and to
        the output instead); equal to `self` for other models."""
        return msgspec.structs.replace(self, layers=tuple(_compressed(x) for x in self.layers))


def _compressed(layer: LayerCost) -> LayerCost:
    if layer.latent_rank is None:
        return layer
    return msgspec.structs.replace(
        layer,
        kv_heads=1,
        head_dim_k=layer.latent_rank + layer.latent_rope_dim,
        head_dim_v=layer.latent_rank,
        values_are_keys=True,
    )
