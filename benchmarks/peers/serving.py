"""The subject's side of the conversation with run.py. Standard library only: peers' environments
have no Lamina.

A subject reads one JSON object per line from its standard input, {"method": ..., "arguments":
[...]}, and answers with one line on its original standard output, {"result": ...} or {"error":
...}. Whatever the subject's libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from collections.abc import Callable
from typing import Any, Protocol


class Subject(Protocol):
    """Something that computes prompts and decodes them greedily, all sequences in step."""

    def prefill(self, prompts: list[list[int]]) -> float:
        """Forget earlier prompts and compute these; returns seconds until each has one token."""

    def decode(self, num_steps: int) -> list[float]:
        """Generate `num_steps` more tokens of every prompt; returns seconds of each step."""

    def close(self) -> None:
        """Free what would outlive the process."""


def random_prompts(batch: int, context: int, vocab_size: int, seed: int) -> list[list[int]]:
    """`batch` prompts of `context` token ids, the same for every subject."""
    generator = random.Random(seed)
    return [generator.choices(range(vocab_size), k=context) for _ in range(batch)]


def serve(make: Callable[[dict[str, Any]], Subject], version: str) -> None:
    """Make the subject from the settings on the command line, and answer until input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # prints of libraries must not end up between the replies

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")

    settings = json.loads(sys.argv[1])
    try:
        subject = make(settings)
        reply({"result": version})
        for line in sys.stdin:
            request = json.loads(line)
            if request["method"] == "prefill":
                prompts = random_prompts(*request["arguments"])
                result: object = subject.prefill(prompts)
            else:
                result = getattr(subject, request["method"])(*request["arguments"])
            reply({"result": result})
        subject.close()
    except Exception as error:  # whatever it is, run.py must say so
        traceback.print_exc()
        reply({"error": f"{type(error).__name__}: {error}"})
    os._exit(0)  # libraries' own shutdown takes seconds and has nothing to save
