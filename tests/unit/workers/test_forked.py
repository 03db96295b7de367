"""Processes forked from one that holds the weights: their lives, their threads, their memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers as hf

_LIVES = """
import os, sys, time
from lamina.workers.process import WorkerProcess, limit_threads
from lamina.workers.forked import ForkedWorkers

def end(code):
    def target():
        if code == "kill":
            os.kill(os.getpid(), 9)
        if code == "raise":
            raise RuntimeError("this child raises")
        raise SystemExit(code)
    return target

limit_threads(1)
workers = ForkedWorkers({"ok": lambda: None, "seven": end(7), "kill": end("kill"),
                         "raise": end("raise"), "stay": lambda: time.sleep(60)})
ended = {}
while len(workers) > 1:
    ended |= workers.wait(20)
assert ended == {"ok": 0, "seven": 7, "kill": -9, "raise": 1}, ended
begin = time.monotonic()
assert workers.wait(0.1) == {}
workers.terminate(5)
assert time.monotonic() - begin < 3
assert len(workers) == 0 and workers.wait() == {}
print("fine")
"""

_ORPHANS = """
import os, time
from lamina.workers.forked import ForkedWorkers

def target():
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(60)

workers = ForkedWorkers({str(i): target for i in range(3)})
time.sleep(60)
"""

_SHARE = """
import json, os, sys
from pathlib import Path
import torch
from lamina._native import ThreadPool
from lamina.convert import convert
from lamina.workers.forked import ForkedWorkers
from lamina.workers.process import limit_threads, pinned_pool

folder, num_replicas = Path(sys.argv[1]), int(sys.argv[2])
limit_threads(1)
model = convert(folder, load_format="dummy")
pool = ThreadPool(1)
model.optimize(pool)

@torch.inference_mode()
def step():
    ids = torch.arange(3, 11)
    state = model.begin(ids, torch.arange(8), torch.tensor([7]))
    for layer, spec in enumerate(model.attention_specs):
        model.run_q(layer, state), model.run_kv(layer, state), model.run_deferred(layer, state)
        shape = (8, spec.num_query_heads, spec.head_dim_v)
        state.attention_output = torch.ones(shape, dtype=model.dtype)
    return model.run_last(state)

def say(**facts):
    print(json.dumps(facts | {"num_threads": len(os.listdir("/proc/self/task"))}), flush=True)

def rank():
    limit_threads(2)
    pinned_pool(2, (), pool)
    assert pool.num_threads == 2
    torch.ones(1024, 1024) @ torch.ones(1024, 1024)  # torch's threads work after the fork
    result = [step() for _ in range(3)][-1].double().sum().item()
    say(pid=os.getpid(), result=result)
    os.read(0, 1)

say(model=model.passes.num_packed_bytes)
workers = ForkedWorkers({str(i): rank for i in range(num_replicas)})
while len(workers):
    assert set(workers.wait(60).values()) <= {0}
"""


def _run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )


def test_exit_codes_and_ends() -> None:
    result = _run(_LIVES)
    assert result.stdout == "fine\n", result.stderr
    assert "this child raises" in result.stderr


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_no_orphans_when_the_parent_dies(end: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", _ORPHANS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(process.stdout.readline()) for _ in range(3)]  # each says it when it runs
    os.kill(pids[1], signal.SIGSTOP)
    process.send_signal(end)
    process.communicate(timeout=10)
    deadline = time.monotonic() + 5
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, "all children end"
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of about 200 MiB: large beside what each process has of its own."""
    path = tmp_path_factory.mktemp("large")
    config = hf.LlamaConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_key_value_heads=4,
        num_hidden_layers=12, vocab_size=2048, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(path)
    return path


def test_replicas_have_one_copy_of_the_weights(folder: Path) -> None:
    totals = []
    for num_replicas in (1, 2):
        process = subprocess.Popen(
            [sys.executable, "-c", _SHARE, str(folder), str(num_replicas)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        host = json.loads(process.stdout.readline())
        ranks = [json.loads(process.stdout.readline()) for _ in range(num_replicas)]
        memory = [_memory(pid) for pid in (process.pid, *(rank["pid"] for rank in ranks))]
        process.stdin.close()  # all were measured while all lived
        assert process.wait(30) == 0
        process.stdout.close()
        assert host["num_threads"] == 1, "nobody else computes when the host forks"
        assert len({rank["result"] for rank in ranks}) == 1, "all compute the same"
        assert all(rank["num_threads"] > 1 for rank in ranks)
        assert host["model"] > 180 << 20
        for rank in memory[1:]:
            assert rank["Private_Dirty"] + rank["Private_Clean"] < host["model"] // 2
        totals.append(sum(m["Pss"] for m in memory))
    assert totals[0] > host["model"]
    assert totals[1] - totals[0] < host["model"] // 2, "a second replica costs little"


def _memory(pid: int) -> dict[str, int]:
    """Bytes by kind; Pss counts a page that n processes share as 1/n."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name.rstrip(":"): int(kib) << 10 for name, kib, _ in map(str.split, lines)}
