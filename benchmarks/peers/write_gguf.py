"""Write a GGUF file of a Qwen3 shape with random bfloat16 weights, for llama.cpp.

Runs in an environment with the `gguf` and `numpy` packages (setup.sh makes one):

    python write_gguf.py config.json model.gguf
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

WEIGHT_SCALE = 0.02
"""Standard deviation of the random weights, as transformers initialises them."""


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 values cut to bfloat16, as the bytes that GGUF stores: uint8 [..., 2 * columns]."""
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """llama.cpp's tensor names and shapes (rows, columns) of a Qwen3 config, tied embeddings."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config["head_dim"]
    q_size = config["num_attention_heads"] * head
    kv_size = config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config["vocab_size"], hidden),
        "output_norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {
            "attn_norm": (hidden,),
            "attn_q": (q_size, hidden),
            "attn_k": (kv_size, hidden),
            "attn_v": (kv_size, hidden),
            "attn_q_norm": (head,),
            "attn_k_norm": (head,),
            "attn_output": (hidden, q_size),
            "ffn_norm": (hidden,),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }.items():
            shapes[f"blk.{layer}.{name}.weight"] = shape
    return shapes


def write(config: dict[str, Any], path: Path) -> None:
    """Write the file; ValueError for a config that is not a Qwen3 with tied embeddings."""
    if config["model_type"] != "qwen3" or not config["tie_word_embeddings"]:
        raise ValueError(
            f"model_type {config['model_type']!r} with tie_word_embeddings="
            f"{config['tie_word_embeddings']}: only qwen3 with tied embeddings can be written; "
            "add its tensor names to tensor_shapes"
        )
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")  # token ids in, token ids out: no texts needed
    generator = np.random.default_rng(0)
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
            continue
        values = generator.standard_normal(shape, np.float32) * np.float32(WEIGHT_SCALE)
        writer.add_tensor(name, bfloat16(values), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, help="config.json of the shape")
    parser.add_argument("output", type=Path, help="the .gguf file to write")
    arguments = parser.parse_args()
    partial = arguments.output.with_suffix(".partial")  # a broken file must not look finished
    write(json.loads(arguments.config.read_text()), partial)
    partial.rename(arguments.output)


if __name__ == "__main__":
    main()
