"""A deterministic engine behind the real app on a real socket.

The tokenizer has one token per byte (ids are byte values), then BOS 256 and EOS 257. The engine
answers with `engine.reply`, one token per chunk.
"""

from __future__ import annotations

import asyncio
import codecs
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import uvicorn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lamina.engine.messages import EngineStats, ExecutorStats, ModelInfo
from lamina.engine.outputs import GenerationChunk, TokenLogprob
from lamina.errors import RequestError
from lamina.types import FinishReason, SamplingParams

BOS, EOS = 256, 257
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ raise_exception('no tool role here') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% if not loop.last %};{% endif %}{% endfor %}"
    "{% if shout is defined %}!{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; id = byte value."""
    letters = _byte_letters()
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-in for every byte value."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


class FakeEngine:
    """Implements `lamina.server.contract.ServingEngine`."""

    def __init__(self) -> None:
        self.model = ModelInfo(
            architecture="Fake",
            dtype="float32",
            vocab_size=258,
            max_model_len=200,
            eos_token_ids=(EOS,),
            max_num_seqs=4,
            max_num_waiting=8,
            attention="nowhere",
        )
        self.tokenizer: Any = byte_tokenizer()
        self.reset()

    def reset(self) -> None:
        self.stats = EngineStats(
            num_running=2,
            num_waiting=1,
            executors=(
                ExecutorStats(name="attention-1", pages_used=3, pages_total=12),
                ExecutorStats(name="attention-2", pages_used=6, pages_total=12),
            ),
            preemptions_total=5,
            steps_total=7,
            seconds={"attention": 1.5},
        )
        self.reply: Callable[[int], str] = lambda index: f"{index}: hé wörld"
        self.delay_s = 0.0
        self.error: Exception | None = None
        self.fail_after: int | None = None
        self.fails: Callable[[Any], bool] = lambda prompt: True
        self.failure = GenerationChunk(
            index=0, text="", finish_reason=FinishReason.ERROR, error="attention-1 was lost"
        )
        self.hang_after: int | None = None
        self.unhealthy: str | None = None
        self.started: list[SimpleNamespace] = []
        self.aborted: list[str] = []
        self.shutdowns = 0
        self.exit_code = 0

    def health(self) -> Any:
        return SimpleNamespace(ok=self.unhealthy is None, reason=self.unhealthy)

    async def shutdown(self, grace_s: float = 5.0) -> int:
        self.shutdowns += 1
        return self.exit_code

    def generate(
        self, prompt: Any, sampling: SamplingParams, *, request_id: str | None = None
    ) -> AsyncGenerator[GenerationChunk, None]:
        assert request_id is not None
        chunks = self._generate(prompt, sampling, request_id)
        # The reference keeps the garbage collector from closing what the server forgets to close.
        self.started.append(
            SimpleNamespace(ids=prompt, sampling=sampling, id=request_id, chunks=chunks)
        )
        return chunks

    async def _generate(
        self, prompt: Any, sampling: SamplingParams, request_id: str
    ) -> AsyncGenerator[GenerationChunk, None]:
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        if len(prompt) >= self.model.max_model_len:
            raise RequestError(f"prompt has {len(prompt)} tokens, too many", "prompt")
        finished = False
        try:
            answers = [self._answer(i, prompt, sampling) for i in range(sampling.n)]
            while answers:
                for answer in tuple(answers):
                    await asyncio.sleep(self.delay_s)
                    if (chunk := next(answer, None)) is None:
                        answers.remove(answer)
                        continue
                    if chunk is self.failure:
                        finished = sampling.n == 1
                    elif self.hang_after is not None and len(chunk.token_ids) > 0:
                        self.hang_after -= 1
                        if self.hang_after < 0:
                            await asyncio.sleep(60)
                    yield chunk
                    if finished:
                        return
            finished = True
        finally:
            if not finished:
                self.aborted.append(request_id)

    def _answer(
        self, index: int, prompt: Any, sampling: SamplingParams
    ) -> Iterator[GenerationChunk]:
        ids = list(self.reply(index).encode())
        limit = sampling.max_tokens or 100
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i, token_id in enumerate(ids[:limit]):
            if self.fail_after is not None and i >= self.fail_after and self.fails(prompt):
                yield self.failure
            reason = None
            if i == min(limit, len(ids)) - 1:
                reason = FinishReason.LENGTH if limit < len(ids) else FinishReason.STOP
            first = i == 0 and sampling.prompt_logprobs is not None
            yield GenerationChunk(
                index=index,
                text=decoder.decode(bytes([token_id]), final=reason is not None),
                token_ids=(token_id,),
                logprobs=(logprob(token_id, sampling.logprobs),)
                if sampling.logprobs is not None
                else None,
                prompt_logprobs=(
                    None,
                    *(logprob(t, sampling.prompt_logprobs or 0) for t in prompt[1:]),
                )
                if first
                else None,
                finish_reason=reason,
            )


def logprob(token_id: int, num_top: int) -> TokenLogprob:
    """Log-probability -id/100 at rank 2, below token 122 ('z') with -0.01."""

    def text_of(token: int) -> tuple[str, bytes]:
        raw = b"<s>" if token == BOS else bytes([token])
        return raw.decode(errors="replace"), raw

    top = [(t, *text_of(t), value) for t, value in ((122, -0.01), (token_id, -token_id / 100))]
    text, utf8 = text_of(token_id)
    return TokenLogprob(
        token_id=token_id,
        token=text,
        utf8=utf8,
        logprob=-token_id / 100,
        rank=2,
        top=tuple(top[:num_top]),
    )


class Live:
    """An app on a real socket, served by a thread."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self._server = uvicorn.Server(
            uvicorn.Config(app, port=0, http="h11", ws="none", log_config=None, access_log=False)
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> Live:
        self._thread.start()
        wait_until(lambda: self._server.started)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)
