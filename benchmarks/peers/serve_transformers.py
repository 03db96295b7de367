"""transformers as a subject, as Lamina's own benchmark has it."""

from __future__ import annotations

from typing import Any

import transformers
from serving import serve

from lamina.bench.subjects import TransformersSubject


def make(settings: dict[str, Any]) -> TransformersSubject:
    return TransformersSubject(settings["folder"], settings["threads"])


if __name__ == "__main__":
    serve(make, transformers.__version__)
