"""`LLM` against the echoing engine process."""

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamina.config import AttentionWorkerConfig
from lamina.engine import client
from lamina.engine.llm import LLM, _config
from lamina.errors import ConfigError, EngineDead, LaminaError, RequestError
from lamina.types import FinishReason, SamplingParams


@pytest.fixture(scope="module")
def llm(model_folder: Path, fake_engine: tuple[str, ...]) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "_SERVICE", (*fake_engine, "normal"))
        with LLM(model_folder) as running:
            yield running


def test_completions_come_in_order(llm: LLM) -> None:
    prompts = [f"prompt {number} " for number in range(30)]  # more than the queue takes at once
    completions = llm.generate(prompts, SamplingParams(max_tokens=12))
    assert [c.prompt for c in completions] == prompts
    for prompt, completion in zip(prompts, completions, strict=True):
        (answer,) = completion.answers
        assert answer.text == (prompt * 2)[:12]
        assert answer.finish_reason is FinishReason.LENGTH
        assert answer.logprobs is None
        assert completion.prompt_token_ids == tuple(llm.tokenizer.encode(prompt))


def test_one_prompt_ids_and_parameters_of_their_own(llm: LLM) -> None:
    (completion,) = llm.generate("abc")
    assert len(completion.answers[0].token_ids) == 16
    parameters = [SamplingParams(max_tokens=2), SamplingParams(n=3, max_tokens=4, logprobs=0)]
    first, second = llm.generate([[70, 71], [72]], parameters)
    assert first.answers[0].token_ids == (70, 71)
    assert first.prompt is None
    assert [a.index for a in second.answers] == [0, 1, 2]
    assert all(len(a.logprobs or ()) == 4 for a in second.answers)
    (scored,) = llm.generate("abc", SamplingParams(prompt_logprobs=1))
    assert scored.prompt_logprobs is not None
    assert len(scored.prompt_logprobs) == 3
    assert llm.generate([]) == []


def test_chat(llm: LLM) -> None:
    chat = [{"role": "user", "content": "hi"}]
    for messages, count in ((chat, 1), ([chat, chat], 2)):
        completions = llm.chat(messages, SamplingParams(max_tokens=8))
        assert [c.answers[0].text for c in completions] == ["[user]hi"] * count


def test_a_bad_prompt_abandons_the_others(llm: LLM) -> None:
    with pytest.raises(RequestError, match="empty"):
        llm.generate(["a", "", "b"], SamplingParams(max_tokens=900))
    with pytest.raises(LaminaError, match="NaN logits"):
        llm.generate(["a", "b"], SamplingParams(max_tokens=900, seed=666))
    assert llm._engine.num_unfinished == 0
    with pytest.raises(RequestError, match="list of its own"):
        llm.generate([1, 2, 3])
    with pytest.raises(RequestError, match="2 prompts"):
        llm.generate(["a", "b"], [SamplingParams()])


def test_a_closed_llm_says_so(
    model_folder: Path, fake_engine: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_SERVICE", (*fake_engine, "normal"))
    closed = LLM(str(model_folder))
    closed.close()
    closed.close()
    with pytest.raises(EngineDead, match="closed"):
        closed.generate("a")


def test_a_failed_start_raises_its_error(
    model_folder: Path, fake_engine: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_SERVICE", (*fake_engine, "exit"))
    with pytest.raises(EngineDead, match="exit code 3"):
        LLM(model_folder)


def test_a_script_without_a_main_guard_or_close(
    model_folder: Path, fake_engine: tuple[str, ...], tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from lamina.engine import client\n"
        "from lamina.engine.llm import LLM\n"
        f"client._SERVICE = {(*fake_engine, 'normal')!r}\n"
        f"llm = LLM({str(model_folder)!r})\n"
        "print(llm.generate('abc')[0].answers[0].text, llm.model.architecture)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    text, pid = done.stdout.split()
    assert text == "abcabcabcabcabca"
    assert not Path(f"/proc/{pid}").exists()


def test_engine_fields() -> None:
    config = functools.partial(_config, "folder")
    assert config({"attention_workers": 2}).attention_workers == (AttentionWorkerConfig(),) * 2
    (worker,) = config({"attention_workers": "cpu:1GiB"}).attention_workers
    assert worker.memory_bytes == 2**30
    assert config({"attention_workers": (worker,)}).attention_workers == (worker,)
    for fields, words in (
        ({"atention": "local"}, "atention"),
        ({"max_num_seqs": "many"}, "max_num_seqs"),
        ({"block_size": 0}, "block_size"),
    ):
        with pytest.raises(ConfigError, match=words):
            config(fields)
