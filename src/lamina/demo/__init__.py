"""The demo model that ships with the package, so that the first minute needs no download.

`model/` is an ordinary Hugging Face model folder: a small Llama, trained by
`tools/train_demo_model.py` on text that the script makes up. It tells short stories and answers
questions about who has what and where.
"""

from __future__ import annotations

from pathlib import Path

from lamina.errors import CheckpointError

_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")


def demo_model_path() -> Path:
    """The folder of the bundled demo model; CheckpointError if it did not come with the package."""
    folder = Path(__file__).parent / "model"
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"the demo model in {folder} lacks {', '.join(missing)}: reinstall lamina-serve, or in "
            f"a source tree run `python tools/train_demo_model.py --out {folder}`"
        )
    return folder
