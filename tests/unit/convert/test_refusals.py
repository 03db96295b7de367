"""What cannot be cut is refused with the layer and the reason."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as hf

from lamina.convert import convert_structure
from lamina.errors import ConversionError

_SMALL: dict[str, Any] = {"hidden_size": 32, "vocab_size": 64, "num_hidden_layers": 2}
_HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize(
    ("config", "layer", "says"),
    [
        (lambda: hf.BloomConfig(hidden_size=32, n_head=4, n_layer=2, vocab_size=64), None,
         "attention interface"),
        (lambda: hf.MambaConfig(**_SMALL), 0, "linear_attention"),
        (lambda: hf.RwkvConfig(**_SMALL), None, "attention interface"),
        (lambda: hf.FalconConfig(**_SMALL, num_attention_heads=4), None, "attention interface"),
        (lambda: hf.FalconH1Config(**_SMALL, **_HEADS, **_TOKENS), 0, "hybrid"),
        (lambda: hf.Lfm2Config(**_SMALL, **_HEADS, layer_types=["full_attention", "conv"]), 1,
         "conv"),
        (lambda: hf.Llama4TextConfig(**_SMALL, **_HEADS, **_TOKENS), 0, "chunked_attention"),
        (lambda: hf.T5Config(d_model=32, num_layers=2, vocab_size=64), None, "encoder-decoder"),
        (lambda: hf.BertConfig(**_SMALL, num_attention_heads=4), None, "neither causal"),
        (lambda: hf.LlamaConfig(
            **_SMALL, num_attention_heads=4, max_position_embeddings=256,
            rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0,
                             "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                             "original_max_position_embeddings": 64}), None, "longrope"),
    ],
    ids=["bloom", "mamba", "rwkv", "falcon", "falcon_h1", "lfm2", "llama4", "t5", "bert",
         "longrope"],
)  # fmt: skip
def test_refused(config: Any, layer: int | None, says: str) -> None:
    with pytest.raises(ConversionError, match=says) as caught:
        convert_structure(config())
    assert caught.value.layer == layer
    if layer is not None:
        assert f"layer {layer}" in str(caught.value)


def test_a_layer_without_attention_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    attend = LlamaAttention.forward

    def skip_in_layer_1(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if self.layer_idx == 1:
            return hidden_states, None
        return attend(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", skip_in_layer_1)
    with pytest.raises(ConversionError, match="no attention op") as caught:
        convert_structure(hf.LlamaConfig(**_SMALL, num_attention_heads=4))
    assert caught.value.layer == 1


def test_a_mixer_beside_attention_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x.cumsum(1)))
    with pytest.raises(ConversionError, match=r"layers\.0\.mlp mixes tokens .*cumsum") as caught:
        convert_structure(hf.LlamaConfig(**_SMALL, num_attention_heads=4))
    assert caught.value.layer == 0


def test_a_window_in_the_mask_that_attention_does_not_know_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.mistral.modeling_mistral import MistralAttention

    attend = MistralAttention.forward

    def forget_window(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.config.sliding_window, window = None, self.config.sliding_window
        try:
            return attend(self, *args, **kwargs)
        finally:
            self.config.sliding_window = window

    monkeypatch.setattr(MistralAttention, "forward", forget_window)
    with pytest.raises(ConversionError, match="window None"):
        convert_structure(hf.MistralConfig(**_SMALL, **_HEADS, sliding_window=8))
