"""Train the demo model that ships with Lamina, with its tokenizer and chat template, from nothing.

    python tools/train_demo_model.py --out src/lamina/demo/model

The text comes from `demo_dialogues.documents`; no other data is read. The model is a Llama of 1.4
million parameters, small enough to train on one CPU core in a quarter of an hour, and learns one
thing well: to look up in its context who has what, and where. Same seed, same machine type, same
number of threads and same library versions give the same bits; elsewhere the recipe is the same and
the weights differ in rounding.

The weights in the package are this recipe's after 1000 of its 2000 steps.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from demo_circuit import NUM_PLANTED_LAYERS, plant_lookup_circuit
from demo_dialogues import (
    BOS,
    END_OF_TURN,
    EOS,
    PAD,
    ROLE_TOKENS,
    SPECIAL_TOKENS,
    HeldOutDialogue,
    documents,
    held_out_dialogues,
    render,
)

# Shape letters: B rows of a batch, T tokens of a row, V vocabulary.

SEED = 20
VOCAB_SIZE = 1280
NUM_TOKENIZER_DOCUMENTS = 20_000
MAX_POSITIONS = 1024

ROW_TOKENS = 256
BATCH_ROWS = 8
MUON_LEARNING_RATE = 0.01
# The planted attention heads work from the start: quick steps would only tear them down again
# while the rest of the model learns to write sentences.
PLANTED_LEARNING_RATE = 0.002
ADAM_LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01
WARMUP_STEPS = 30
# A word that a document has not used yet is mostly a matter of chance, one that comes back is not.
NEW_TOKEN_WEIGHT = 0.1
ANSWER_WEIGHT = 0.5

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'system' or message['role'] == 'developer' %}"
    "{{- '<|system|>' }}"
    "{%- elif message['role'] == 'user' %}"
    "{{- '<|user|>' }}"
    "{%- elif message['role'] == 'assistant' %}"
    "{{- '<|assistant|>' }}"
    "{%- else %}"
    "{{- raise_exception('the demo model knows the roles system, user and assistant, not ' "
    "+ message['role']) }}"
    "{%- endif %}"
    "{{- message['content'] | trim + '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


class Batch(NamedTuple):
    """Rows of whole documents.

    tokens   [B, T] int64
    weights  [B, T] float32: how much the prediction of this token counts; 0 for padding and BOS
    mask     [B, 1, T, T] bool: where a token may attend, causal and within its own document
    """

    tokens: Tensor
    weights: Tensor
    mask: Tensor


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: it encodes any text, the stories' words mostly in one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stream = documents(seed)
    texts = [next(stream) for _ in range(NUM_TOKENIZER_DOCUMENTS)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[END_OF_TURN, *ROLE_TOKENS.values()],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh model in float32. Its 4 KV heads can be split over 1, 2 or 4 workers."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)],
    )
    return model


def loss_weights(ids: list[int], assistant_id: int, end_ids: tuple[int, int]) -> list[float]:
    """The loss weight of each token of a document.

    0 for BOS, 1 for a token seen before and for the ends of turns and documents, less for the other
    words of the assistant, and least for what only a user or a story can know.
    """
    weights: list[float] = []
    seen: set[int] = set()
    answering = False
    for token in ids:
        if token in seen or token in end_ids:
            weights.append(1.0)
        else:
            weights.append(ANSWER_WEIGHT if answering else NEW_TOKEN_WEIGHT)
        seen.add(token)
        answering = token == assistant_id or (answering and token not in end_ids)
    weights[0] = 0.0
    return weights


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Batch]:
    """Endless batches of BATCH_ROWS rows, each filled with documents while they fit."""
    stream = documents(seed)
    assistant_id = tokenizer.convert_tokens_to_ids(ROLE_TOKENS["assistant"])
    end_ids = (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN))
    pending: list[int] = []
    while True:
        tokens_BT = torch.full((BATCH_ROWS, ROW_TOKENS), tokenizer.pad_token_id)
        weights_BT = torch.zeros(BATCH_ROWS, ROW_TOKENS)
        document_BT = torch.full((BATCH_ROWS, ROW_TOKENS), -1)
        for row in range(BATCH_ROWS):
            start = 0
            for number in range(ROW_TOKENS):
                if not pending:
                    pending = tokenizer.encode(next(stream), add_special_tokens=False)
                    pending = pending[:ROW_TOKENS]
                end = start + len(pending)
                if end > ROW_TOKENS:
                    break
                tokens_BT[row, start:end] = torch.tensor(pending)
                weights_BT[row, start:end] = torch.tensor(
                    loss_weights(pending, assistant_id, end_ids)
                )
                document_BT[row, start:end] = number
                start, pending = end, []
        same_document_BTT = document_BT[:, :, None] == document_BT[:, None, :]
        yield Batch(tokens_BT, weights_BT, same_document_BTT.tril()[:, None])


def learning_rate_share(step: int, steps: int) -> float:
    """The share of the peak learning rate at `step`: linear warm-up, then a cosine to zero."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)))


def matrices(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The module's two-dimensional parameters."""
    return [p for p in module.parameters() if p.ndim == 2]


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> float:
    """Train `model` in place for `steps` batches; returns the mean loss of the last fifty."""
    layers = model.model.layers
    planted = [p for layer in layers[:NUM_PLANTED_LAYERS] for p in matrices(layer.self_attn)]
    muon_groups: list[dict[str, Any]] = [
        {"params": planted, "lr": PLANTED_LEARNING_RATE},
        {"params": [p for p in matrices(layers) if all(p is not q for q in planted)]},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(muon_groups, lr=MUON_LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(
            [p for p in model.parameters() if all(p is not q for q in matrices(layers))],
            lr=ADAM_LEARNING_RATE,
            betas=(0.9, 0.98),
            weight_decay=WEIGHT_DECAY,
        ),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(step, steps))
        for optimizer in optimizers
    ]
    check = held_out_dialogues(SEED + 2, 50)
    losses: list[float] = []
    started_s = time.monotonic()
    stream = batches(tokenizer, SEED)
    for step in range(1, steps + 1):
        batch = next(stream)
        logits_BTV = model(
            input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False
        ).logits
        token_losses = F.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none"
        )
        weights = batch.weights[:, 1:].flatten()
        loss = (token_losses * weights).sum() / weights.sum()
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            accuracy = sum(evaluate(model, tokenizer, check).values()) / len(check)
            print(
                f"step {step:5d}/{steps}  loss {mean(losses[-50:]):.3f}  "
                f"held-out answers {accuracy:4.0%}  {time.monotonic() - started_s:5.0f} s",
                flush=True,
            )
    return mean(losses[-50:])


def mean(values: list[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, dialogues: list[HeldOutDialogue]
) -> dict[str, int]:
    """How many answers per kind of question are right, word for word, under greedy decoding.

    One pass over question and answer suffices: greedy decoding writes the answer if and only if
    every token of it, and the end of the turn, is the likeliest after what precedes it.
    """
    correct: dict[str, int] = {}
    for dialogue in dialogues:
        prompt = render(dialogue.messages) + ROLE_TOKENS["assistant"]
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        answer_ids = tokenizer.encode(dialogue.answer + END_OF_TURN, add_special_tokens=False)
        logits_BTV = model(torch.tensor([prompt_ids + answer_ids]), use_cache=False).logits
        likeliest = logits_BTV[0, len(prompt_ids) - 1 : -1].argmax(-1).tolist()
        correct[dialogue.kind] = correct.get(dialogue.kind, 0) + (likeliest == answer_ids)
    return correct


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model (bfloat16, safetensors), generation config, tokenizer and chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def report(folder: Path) -> None:
    """Load what was saved, as a user would, and print its size and what it knows."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    num_bytes = (folder / "model.safetensors").stat().st_size
    print(f"{model.num_parameters():,} parameters, {num_bytes:,} bytes in {folder}")
    for num_facts in (1, 2, 3, 4):
        dialogues = held_out_dialogues(SEED + 3, 200, num_facts=num_facts)
        correct = evaluate(model, tokenizer, dialogues)
        details = "  ".join(f"{kind} {count}/40" for kind, count in correct.items())
        share = sum(correct.values()) / len(dialogues)
        print(f"held-out answers over {num_facts} facts: {share:.1%}  ({details})")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train Lamina's demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=2000, help="optimiser steps")
    arguments = parser.parse_args()

    set_seed(SEED)
    torch.use_deterministic_algorithms(True)
    tokenizer = train_tokenizer(SEED)
    model = build_model(tokenizer)
    plant_lookup_circuit(model)
    loss = train(model, tokenizer, arguments.steps)
    print(f"final loss {loss:.3f}")
    save(model, tokenizer, arguments.out)
    report(arguments.out)


if __name__ == "__main__":
    main()
