"""Hugging Face configs -> model costs, without transformers.

Every number follows from the config's fields, with transformers' defaults for those that older
configs leave out (`families`).
"""

from __future__ import annotations

from typing import Any, NoReturn

from lamina.errors import ConfigError
from lamina.plan.families import FAMILIES, Family, Flag
from lamina.plan.layers import LayerCost, ModelCost
from lamina.plan.names import find_by_name

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}


def model_cost(config: dict[str, Any], *, name: str) -> ModelCost:
    """The costs that follow from a Hugging Face config (what config.json holds).

    Raises:
        ConfigError: the architecture is unknown, or a field is missing or makes no sense.
    """
    return _Reader(config, name).model()


class _Layer:
    """Adds up a layer's matrices and vectors."""

    def __init__(self) -> None:
        self.params = 0
        self.active = 0
        self.activations = 0

    def matrix(
        self, fan_in: int, fan_out: int, *, bias: bool = False, copies: int = 1, used: int = 1
    ) -> int:
        """`copies` of a matrix, of which a row is multiplied with `used`; parameters of one."""
        one = fan_in * fan_out + bias * fan_out
        self.params += copies * one
        self.active += used * fan_in * fan_out
        self.activations += used * (fan_in + fan_out)
        return one

    def vector(self, size: int) -> None:
        self.params += size


class _Reader:
    def __init__(self, config: dict[str, Any], name: str) -> None:
        self._name = name
        if not isinstance(config, dict):
            raise ConfigError(f"model {name}: the config must be an object of fields")
        outer = config
        text = config.get("text_config")
        config = text if isinstance(text, dict) else config
        if "quantization_config" in outer or "quantization_config" in config:
            raise ConfigError(
                f"model {name}: its weights are quantized, which Lamina does not serve; plan for "
                f"float32, bfloat16 or float16 by leaving quantization_config out of the config"
            )
        self._config = config
        self.model_type = str(config.get("model_type", "nothing"))
        self._family: Family = (
            FAMILIES[self.model_type]
            if self.model_type in FAMILIES
            else find_by_name(
                self.model_type, FAMILIES, f"model {name}: model_type",
                "Architectures without a family here have no costs.",
            )
        )  # fmt: skip
        dtype = str(config.get("dtype") or config.get("torch_dtype") or outer.get("dtype")
                    or outer.get("torch_dtype") or "bfloat16")  # fmt: skip
        if dtype not in _BYTES:
            self._fail("dtype", f"one of {', '.join(_BYTES)}", dtype)
        self._bytes = _BYTES[dtype]
        self._hidden = self._int("hidden_size", "n_embd")
        self._heads = self._int("num_attention_heads", "n_head")
        self._kv_heads = self._int("num_key_value_heads", default=self._heads)
        if not self._kv_heads or self._heads % self._kv_heads:
            self._fail("num_key_value_heads", f"a divisor of {self._heads}", self._kv_heads)
        own = self._family.head_dim or self._hidden // self._heads
        self._head_dim = self._int("head_dim", default=own)
        self._num_layers = self._int("num_hidden_layers", "n_layer")
        self._width = self._int("word_embed_proj_dim", default=self._hidden)

    def model(self) -> ModelCost:
        family, hidden = self._family, self._hidden
        vocab = self._int("vocab_size")
        width = self._width
        embedding = vocab * width
        if family.position_padding is not None:
            length = self._int("max_position_embeddings", "n_positions")
            embedding += (length + family.position_padding) * hidden
        other = vocab if family.head_bias else 0
        if self._config.get("do_layer_norm_before", True):
            other += family.norm_vectors * hidden
        return ModelCost(
            name=self._name,
            architecture=self.model_type,
            layers=tuple(self._layer(index) for index in range(self._num_layers)),
            hidden_size=hidden,
            vocab_size=vocab,
            embedding_params=embedding,
            head_params=vocab * width,
            other_params=other,
            tied=bool(self._config.get("tie_word_embeddings", family.tied)),
            bytes_per_param=self._bytes,
            bytes_per_element=self._bytes,
        )

    def _layer(self, index: int) -> LayerCost:
        layer = _Layer()
        for _ in range(self._family.norms):
            layer.vector(self._family.norm_vectors * self._hidden)
        if self._family.sinks:
            layer.vector(self._heads)
        if index == 0 and self._width != self._hidden:  # to and from the embedding's own width
            layer.matrix(self._width, self._hidden)
            layer.matrix(self._hidden, self._width)
        heads = self._latent_attention(layer) if self._is_latent else self._attention(layer)
        experts = self._experts(layer) if self._is_sparse(index) else {}
        if not experts:
            self._mlp(layer, self._inner())
        return LayerCost(
            query_heads=self._heads,
            window=self._window(index),
            weight_params=layer.params,
            active_params_per_token=layer.active,
            activations_per_token=layer.activations,
            **heads,
            **experts,
        )

    def _attention(self, layer: _Layer) -> dict[str, Any]:
        family, size = self._family, self._head_dim
        q, kv = self._heads * size, self._kv_heads * size
        layer.matrix(self._hidden, q + 2 * kv, bias=self._flag(family.qkv_bias))
        layer.matrix(q, self._hidden, bias=self._flag(family.out_bias))
        if family.qk_norm is not None and self._flag(family.qk_norm_if):
            layer.vector(family.norm_vectors * (2 * size if family.qk_norm == "head" else q + kv))
        return {"kv_heads": self._kv_heads, "head_dim_k": size, "head_dim_v": size}

    @property
    def _is_latent(self) -> bool:
        return self._config.get("kv_lora_rank") is not None

    def _latent_attention(self, layer: _Layer) -> dict[str, Any]:
        """DeepSeek's MLA: q, k and v through low ranks; all heads have k and v of their own."""
        bias, hidden, heads = self._flag(self._family.qkv_bias), self._hidden, self._heads
        rank, rope = self._int("kv_lora_rank"), self._int("qk_rope_head_dim")
        nope, v = self._int("qk_nope_head_dim"), self._int("v_head_dim")
        q_rank = self._config.get("q_lora_rank") and self._int("q_lora_rank")
        if q_rank:
            layer.matrix(hidden, q_rank, bias=bias)
            layer.vector(q_rank)
        layer.matrix(q_rank or hidden, heads * (nope + rope))
        layer.matrix(hidden, rank + rope, bias=bias)
        layer.vector(rank)
        layer.matrix(rank, heads * (nope + v))
        layer.matrix(heads * v, hidden, bias=bias)
        return {"kv_heads": heads, "head_dim_k": nope + rope, "head_dim_v": v,
                "latent_rank": rank, "latent_rope_dim": rope}  # fmt: skip

    def _inner(self) -> int:
        return self._int("intermediate_size", "ffn_dim", "n_inner", default=4 * self._hidden)

    def _mlp(self, layer: _Layer, inner: int, *, copies: int = 1, used: int = 1) -> int:
        """Parameters of one copy."""
        bias = self._flag(self._family.mlp_bias)
        up = inner * (2 if self._family.gated else 1)
        first = layer.matrix(self._hidden, up, bias=bias, copies=copies, used=used)
        return first + layer.matrix(inner, self._hidden, bias=bias, copies=copies, used=used)

    def _num_experts(self) -> int:
        return self._int("num_local_experts", "num_experts", "n_routed_experts", default=0)

    def _is_sparse(self, index: int) -> bool:
        return (
            self._num_experts() > 0
            and index >= (self._config.get("first_k_dense_replace") or 0)
            and index not in (self._config.get("mlp_only_layers") or ())
            and (index + 1) % self._int("decoder_sparse_step", default=1) == 0
        )

    def _experts(self, layer: _Layer) -> dict[str, Any]:
        count, used = self._num_experts(), self._int("num_experts_per_tok")
        if used > count:
            self._fail("num_experts_per_tok", f"at most {count}", used)
        inner = self._int("moe_intermediate_size", default=self._inner())
        layer.matrix(self._hidden, count, bias=self._family.router_bias)
        params = self._mlp(layer, inner, copies=count, used=used)
        if shared := self._int("n_shared_experts", default=0):
            self._mlp(layer, shared * inner)
        if shared := self._int("shared_expert_intermediate_size", default=0):
            self._mlp(layer, shared)
            layer.matrix(self._hidden, 1)  # how much of the shared expert a row takes
        return {"num_experts": count, "experts_per_token": used, "params_per_expert": params}

    def _window(self, index: int) -> int | None:
        config, family = self._config, self._family
        if not self._flag(family.window_if):
            return None
        size = self._int("sliding_window", default=family.window or 0)
        if "sliding_window" in config and config["sliding_window"] is None:
            size = 0
        kinds = config.get("layer_types")
        if kinds is not None:
            if len(kinds) != self._num_layers:
                self._fail("layer_types", f"{self._num_layers} entries", len(kinds))
            if kinds[index] not in ("full_attention", "sliding_attention"):
                self._fail("layer_types", "full_attention or sliding_attention", kinds[index])
            slides = kinds[index] == "sliding_attention"
        elif family.window_from is not None:
            slides = index >= self._int(family.window_from, default=self._num_layers)
        else:
            every = self._int("sliding_window_pattern", "_sliding_window_pattern",
                              default=family.full_every or 0)  # fmt: skip
            slides = every == 0 or (index + 1) % every != 0
        return size or None if slides else None

    def _flag(self, flag: Flag) -> bool:
        return flag if isinstance(flag, bool) else bool(self._config.get(flag.name, flag.default))

    def _int(self, *names: str, default: int | None = None) -> int:
        """The first of the fields that is given and not null."""
        for name in names:
            value = self._config.get(name)
            if value is None:
                continue
            if type(value) is not int or value < (0 if default is not None else 1):
                self._fail(name, "a positive whole number", value)
            return value
        if default is None:
            raise ConfigError(f"model {self._name}: the config has no {' or '.join(names)}")
        return default

    def _fail(self, field: str, want: str, value: object) -> NoReturn:
        raise ConfigError(f"model {self._name}: {field} must be {want}, got {value!r}")
