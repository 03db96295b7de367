"""Measure Lamina and its peers in one run, turn by turn. See README.md beside this file.

python benchmarks/peers/run.py --rows decode:1x256,decode:16x256 --turns 9 --json out.json
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import Result, print_table, record, write_json, write_plot
from rows import DEFAULT_ROWS, Group, Row, group_rows, kv_bytes_per_token, parse_rows
from subjects import LlamaCppSubject, ServedSubject, Subject, SubjectFailed, machine_cpu_s

from lamina.bench.options import parse_options
from lamina.bench.shapes import SHAPES, write_shape
from lamina.config import THREAD_ENVIRONMENT, parse_bytes
from lamina.errors import ConfigError

DEFAULT_SUBJECTS = "lamina-local,lamina-1,llama.cpp,vllm,transformers"
_WARMUP_STEPS = 2
_MEMORY_SHARE = 0.9
"""Of the free memory that all subjects together may be expected to use, by default."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is the same for all groups."""

    shape: str
    folder: Path
    """Of the peers' installations."""
    threads: int
    turns: int
    steps: int
    freeze: bool
    memory_bytes: int
    lamina_options: dict[str, Any]
    lamina_environment: dict[str, str]
    vllm_options: dict[str, Any]
    vllm_environment: dict[str, str]
    llama_options: tuple[str, ...]

    @property
    def config(self) -> dict[str, Any]:
        return SHAPES[self.shape]

    @property
    def decode_steps(self) -> int:
        return _WARMUP_STEPS + self.turns * self.steps

    @property
    def model(self) -> Path:
        """Folder of the shape's config.json."""
        return self.folder / "models" / self.shape


def make_subject(name: str, group: Group, setting: Setting) -> Subject:
    """Start one subject with a cache that holds every row of the group; blocks until it is ready.

    Raises:
        SubjectFailed: it did not start.
        ValueError: no such subject.
    """
    logs = setting.folder / "logs"
    logs.mkdir(exist_ok=True)
    kv_bytes = kv_bytes_per_token(setting.config) * group.kv_tokens(setting.decode_steps)
    common: dict[str, Any] = {
        "folder": str(setting.model),
        "batch": group.batch,
        "max_length": group.length(setting.decode_steps),
        "threads": setting.threads,
        # Pages are not filled to the last token.
        "kv_bytes": kv_bytes + group.batch * 256 * kv_bytes_per_token(setting.config),
    }

    def served(python: Path, script: str, environment: dict[str, str], **more: Any) -> Subject:
        return ServedSubject(
            name,
            python,
            script,
            {**common, **more},
            environment,
            log=logs / f"{name}.log",
            vocab_size=int(setting.config["vocab_size"]),
            freeze=setting.freeze,
        )

    if name == "lamina-local" or (name.startswith("lamina-") and name[7:].isdigit()):
        workers = 0 if name == "lamina-local" else int(name[7:])
        environment = {**THREAD_ENVIRONMENT, **setting.lamina_environment}
        options = setting.lamina_options
        python = Path(sys.executable)
        return served(python, "serve_lamina.py", environment, workers=workers, options=options)
    if name == "transformers":
        return served(Path(sys.executable), "serve_transformers.py", {})
    if name == "vllm":
        environment = vllm_environment(setting, common["kv_bytes"])
        python = installed(setting.folder / "vllm" / "bin" / "python")
        return served(python, "serve_vllm.py", environment, options=setting.vllm_options)
    if name == "llama.cpp":
        root = setting.folder / "llama.cpp"
        return LlamaCppSubject(
            installed(root / "build" / "bin" / "llama-batched-bench"),
            gguf_model(setting),
            version=(root / "version").read_text().strip(),
            threads=setting.threads,
            options=setting.llama_options,
            log=logs / f"{name}.log",
        )
    raise ValueError(f"--subjects: {name!r} is none of {DEFAULT_SUBJECTS} or lamina-N, N workers")


def vllm_environment(setting: Setting, kv_bytes: int) -> dict[str, str]:
    """One process, bound to as many of our cores as it has threads, with a cache in whole GiB."""
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[: setting.threads])
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(-(-kv_bytes // 2**30)),
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_CACHE_ROOT": str(setting.folder / "vllm-cache"),
        "OMP_NUM_THREADS": str(setting.threads),
        **setting.vllm_environment,
    }


def installed(path: Path) -> Path:
    if not path.exists():
        raise SubjectFailed(f"{path} does not exist; run benchmarks/peers/setup.sh first")
    return path


def gguf_model(setting: Setting) -> Path:
    """The shape as a GGUF file, written on first use."""
    path = setting.model / "model.gguf"
    if not path.exists():
        python = installed(setting.folder / "gguf" / "bin" / "python")
        script = Path(__file__).parent / "write_gguf.py"
        subprocess.run([python, script, setting.model / "config.json", path], check=True)
    return path


@contextmanager
def running(group: Group, setting: Setting) -> Iterator[list[Subject]]:
    subjects: list[Subject] = []
    try:
        for name in group.subjects:
            log(f"starting {name}")
            subjects.append(make_subject(name, group, setting))
        yield subjects
    finally:
        for subject in subjects:
            subject.close()


def measure(row: Row, subjects: Sequence[Subject], setting: Setting) -> list[Result]:
    """Turns of all subjects, each turn in another order; seconds per turn of every subject."""
    for subject in subjects:
        if row.kind == "decode":
            subject.prepare(row, seed=0)
            subject.decode(_WARMUP_STEPS)
        else:
            subject.prefill(row, seed=0)
    seconds: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    foreign: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    for turn in range(setting.turns):
        first = turn % len(subjects)
        for subject in (*subjects[first:], *subjects[:first]):
            with watching(subject, foreign[subject.name]):
                if row.kind == "decode":
                    value = subject.decode(setting.steps)
                else:
                    value = subject.prefill(row, seed=turn + 1)
            seconds[subject.name].append(value)
    tokens = row.batch * (setting.steps if row.kind == "decode" else row.context)
    return record(row, tokens, seconds, foreign)


@contextmanager
def watching(subject: Subject, foreign_cores: list[float]) -> Iterator[None]:
    """Append how many cores anybody but the subject used meanwhile, on average."""
    start, busy, own = time.perf_counter(), machine_cpu_s(), subject.cpu_s()
    yield
    busy, own = machine_cpu_s() - busy, subject.cpu_s() - own
    foreign_cores.append(max(0.0, busy - own) / (time.perf_counter() - start))


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", default="qwen3-0.5b", choices=sorted(SHAPES))
    add("--rows", default=DEFAULT_ROWS, help="kind:BATCHxCONTEXT,... (default: %(default)s)")
    add("--subjects", default=DEFAULT_SUBJECTS, help="lamina-N: N workers (default: %(default)s)")
    add("--turns", type=int, default=7, help="turns of every subject in a row (default: 7)")
    add("--steps", type=int, default=8, help="decode steps in a turn (default: 8)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every process")
    add("--memory", help="what all subjects together may use, e.g. 20GiB (default: 90 %% of free)")
    add(
        "--folder", type=Path, default=Path(__file__).parent / ".work", help="where setup.sh put it"
    )
    add("--no-freeze", action="store_true", help="leave subjects running between their turns")
    add("--lamina-option", action="append", default=[], metavar="KEY=VALUE", help="of EngineConfig")
    add("--lamina-env", action="append", default=[], metavar="KEY=VALUE")
    add("--vllm-option", action="append", default=[], metavar="KEY=VALUE", help="of EngineArgs")
    add("--vllm-env", action="append", default=[], metavar="KEY=VALUE")
    add("--llama-option", action="append", default=[], metavar="ARGUMENT", help="e.g. -ctk=bf16")
    add("--json", type=Path, metavar="FILE", help="write all figures with every turn")
    add("--plot", type=Path, metavar="FILE", help="draw them; .png or .svg")
    return parser.parse_args()


def free_memory_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return fields["MemAvailable"] * 1024


def make_setting(arguments: argparse.Namespace) -> Setting:
    strings = {}
    for flag in ("lamina_env", "vllm_env"):
        pairs = parse_options(getattr(arguments, flag), f"--{flag.replace('_', '-')}")
        strings[flag] = {key: str(value) for key, value in pairs.items()}
    if min(arguments.turns, arguments.steps, arguments.threads) < 1:
        raise ValueError("--turns, --steps and --threads must be at least 1")
    memory = arguments.memory and parse_bytes(arguments.memory, "--memory")
    return Setting(
        shape=arguments.shape,
        folder=arguments.folder.resolve(),
        threads=arguments.threads,
        turns=arguments.turns,
        steps=arguments.steps,
        freeze=not arguments.no_freeze,
        memory_bytes=memory or int(_MEMORY_SHARE * free_memory_bytes()),
        lamina_options=parse_options(arguments.lamina_option, "--lamina-option"),
        lamina_environment=strings["lamina_env"],
        vllm_options=parse_options(arguments.vllm_option, "--vllm-option"),
        vllm_environment=strings["vllm_env"],
        llama_options=tuple(part for text in arguments.llama_option for part in text.split("=")),
    )


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP end this process in order: stopped subjects cannot end themselves."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, frame: sys.exit(128 + received))


def main() -> None:
    end_on_signals()
    arguments = parse_arguments()
    results: list[Result] = []
    versions: dict[str, str] = {}
    setting: Setting | None = None
    try:
        setting = make_setting(arguments)
        write_shape(setting.shape, setting.model)
        groups = group_rows(
            parse_rows(arguments.rows),
            [name.strip() for name in arguments.subjects.split(",")],
            setting.config,
            decode_steps=setting.decode_steps,
            memory_bytes=setting.memory_bytes,
        )
        for group in groups:
            for name in group.left_out:
                log(f"{name} is left out at {group.rows[0]}: not enough memory (see --memory)")
            with running(group, setting) as subjects:
                versions.update({subject.name: subject.version for subject in subjects})
                for row in group.rows:
                    results += measure(row, subjects, setting)
                    log(f"{row}: done")
                    if arguments.json:  # what was measured is not lost when a later row fails
                        write_json(arguments.json, results, versions, sys.argv)
    except (ConfigError, ValueError, SubjectFailed) as error:
        sys.exit(f"run.py: {error}")
    finally:
        if results and setting:
            print_table(results, versions, setting.threads)
            if arguments.plot:
                write_plot(arguments.plot, results)


if __name__ == "__main__":
    main()
