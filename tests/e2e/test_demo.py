"""The bundled demo model through every way in: Python, the command line, and `lamina demo`."""

from __future__ import annotations

import subprocess
import sys

from lamina import LLM, SamplingParams

FACTS = (
    "Mira is a baker. Mira has a red lantern. The lantern is in the attic. "
    "Tom is a sailor. Tom has a blue drum. The drum is under the bridge."
)
QUESTION = f"{FACTS} Where is the drum?"
ANSWER = "The drum is under the bridge."


def lamina(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lamina", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def test_llm_answers_from_the_context() -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=40)
    with LLM(attention_workers=2) as llm:
        messages = [{"role": "user", "content": QUESTION}]
        (completion,) = llm.chat(messages, greedy)
        assert completion.answers[0].text == ANSWER
        first, second = llm.generate(["Once there was", "The lantern"], greedy)
        assert first.prompt == "Once there was"
        assert 0 < len(second.answers[0].token_ids) <= 40


def test_generate_streams_to_the_terminal() -> None:
    result = lamina("generate", "--prompt", QUESTION, "--chat", "--attention", "local")
    assert result.stdout.strip() == ANSWER


def test_demo_shows_answers_and_where_time_went() -> None:
    result = lamina("demo", "--attention-workers", "1")
    assert ANSWER in result.stdout
    assert "waiting for the attention workers" in result.stdout
