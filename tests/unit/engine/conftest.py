"""A model folder that has only a tokenizer, and an engine process that needs no model."""

import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lamina.config import EngineConfig

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"

FAKE_ENGINE = '''
"""Speaks the engine's messages; the answer to a prompt is the prompt, over and over."""
import json, os, sys, time
import zmq
from lamina.engine.messages import *
from lamina.types import FinishReason, SequenceOutput, TokenLogprobs

mode = sys.argv[1]
if mode == "exit":
    sys.exit(3)
start = json.loads(sys.stdin.readline())
socket = zmq.Context.instance().socket(zmq.PAIR)
socket.connect(start["address"])
send = lambda message: socket.send(encode(message))
if mode == "fail":
    send(Failed("CheckpointError", "weights are truncated"))
    sys.exit(1)
if mode == "failure of an unknown kind":
    send(Failed("Exception", "something else"))
    sys.exit(1)
if mode == "never ready":
    time.sleep(60)

running, steps, failed = {}, 0, False
def stats():
    return EngineStats(num_running=len(running), steps_total=steps, executors=(
        ExecutorStats(name="attention worker 1", pages_used=0, pages_total=9, alive=mode != "lost"),
    ))
def output(request, position):
    prompt, asked = request.prompt_token_ids, request.sampling
    token = prompt[position % len(prompt)]
    common = {"request_id": request.request_id}
    if position == 0 and asked.prompt_logprobs is not None:
        common["prompt_logprobs"] = tuple(TokenLogprobs(t, -2.0, 1, ()) for t in prompt[1:])
    if asked.seed == 666:
        return SequenceOutput(**common, finish_reason=FinishReason.ERROR, error="NaN logits")
    if token in (*request.eos_token_ids, *asked.stop_token_ids):
        return SequenceOutput(**common, finish_reason=FinishReason.STOP, stop_token_id=token)
    if asked.logprobs is not None:
        common["logprobs"] = (TokenLogprobs(token, -1.0, 1, ((token, -1.0),)),)
    finish = FinishReason.LENGTH if position + 1 == asked.max_tokens else None
    return SequenceOutput(**common, token_ids=(token,), finish_reason=finish)

# The process id stands in for the architecture, so that a test can kill the process.
send(Ready(ModelInfo(
    architecture=str(os.getpid()), dtype="float32", attention="none", vocab_size=300,
    max_model_len=1000, eos_token_ids=(1,), max_num_seqs=4, max_num_waiting=4,
), stats()))
while True:
    while socket.poll(2 if running else 50):
        message = decode_to_engine(socket.recv())
        if isinstance(message, AddRequests):
            for request in message.requests:
                running[request.request_id] = [request, 0]
        elif isinstance(message, Abort):
            for request_id in message.request_ids:
                running.pop(request_id, None)
        elif isinstance(message, CheckIntegrity):
            send(IntegrityReport(tuple(running), ()))
        elif mode == "stubborn":
            pass
        else:
            socket.close(linger=1000)
            zmq.Context.instance().term()
            sys.exit(1 if failed else 0)
    outputs = []
    for request_id, (request, position) in list(running.items()):
        outputs.append(output(request, position))
        running[request_id][1] += 1
        if outputs[-1].finish_reason:
            del running[request_id]
    if outputs:
        steps += 1
        send(Outputs(tuple(outputs), stats()))
    if mode == "fails later" and steps == 5 and not failed:
        failed = True
        running.clear()
        send(Failed("PeerLost", "attention worker 1: no heartbeat"))
'''


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level tokenizer whose tokens are single bytes, and a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=258,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["a"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(model_folder: Path) -> EngineConfig:
    return EngineConfig(model=str(model_folder))


@pytest.fixture(scope="session")
def fake_engine(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The command line of the fake engine; append the mode."""
    script = tmp_path_factory.mktemp("engine") / "fake_engine.py"
    script.write_text(FAKE_ENGINE)
    return (sys.executable, str(script))
