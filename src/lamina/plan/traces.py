"""Files of requests -> workloads.

Each file may be gzipped. Rows need not be in the order of their arrival.

- Azure's LLM inference traces: CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens
- Mooncake's: a JSON object per line with timestamp (ms), input_length, output_length, hash_ids
- our own: CSV with the columns arrival_s, prompt_tokens, output_tokens, or a JSON object per line
  with these and, if it likes, hash_ids
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from lamina.errors import ConfigError
from lamina.plan.arrivals import PREFIX_BLOCK_TOKENS, Arrival, Workload
from lamina.types import ceil_div

_GZIP_MAGIC = b"\x1f\x8b"
_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_OWN_COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")
_MOONCAKE_FIELDS = ("timestamp", "input_length", "output_length")

_Row = tuple[float, int, int, tuple[int, ...]]


class _BadRow(Exception):
    """What is wrong with a row."""


def read_azure(path: Path) -> Workload:
    """Azure's CSV; times count from the first request.

    Raises:
        ConfigError: the file cannot be read, or a row is malformed; names its line.
    """
    workload = _read_csv(path, _AZURE_COLUMNS, _timestamp)
    return workload.from_first()


def read_csv(path: Path) -> Workload:
    """Our own CSV. Raises as `read_azure`."""
    return _read_csv(path, _OWN_COLUMNS, _seconds)


def read_mooncake(path: Path) -> Workload:
    """Mooncake's JSON lines, or the same with our own names. Raises as `read_azure`."""
    lines = _lines(path)
    decode = msgspec.json.Decoder().decode

    def row(line: str) -> _Row:
        try:
            fields = decode(line)
        except msgspec.DecodeError as error:
            raise _BadRow(f"not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise _BadRow(f"must be an object, got {line.strip()[:40]!r}")
        names = _OWN_COLUMNS if "arrival_s" in fields else _MOONCAKE_FIELDS
        for name in names:
            if name not in fields:
                raise _BadRow(f"{name} is missing; a line has {', '.join(names)} and hash_ids")
        time, prompt, output = (fields[name] for name in names)
        time_s = _seconds(time, names[0]) / (1.0 if names is _OWN_COLUMNS else 1e3)
        prompt_tokens = _count(prompt, names[1])
        hashes = _hashes(fields.get("hash_ids") or (), prompt_tokens)
        return time_s, prompt_tokens, _count(output, names[2]), hashes

    return _workload(path, _parsed(path, enumerate(lines, 1), row))


def read_trace(path: Path) -> Workload:
    """A file of any of the formats; its first line tells which.

    Raises:
        ConfigError: the file cannot be read, is of no known format, or a row is malformed.
    """
    first = next(_lines(path), "")
    if first.lstrip().startswith("{"):
        return read_mooncake(path)
    header = _fields(first)
    for columns, read in ((_AZURE_COLUMNS, read_azure), (_OWN_COLUMNS, read_csv)):
        if set(columns) <= set(header):
            return read(path)
    raise ConfigError(
        f"{path}, line 1: no known format. A workload is CSV with the columns "
        f"{','.join(_OWN_COLUMNS)} (ours) or {','.join(_AZURE_COLUMNS)} (Azure), or a JSON object "
        f"per line with {', '.join(_MOONCAKE_FIELDS)} (Mooncake); got {first.strip()[:80]!r}"
    )


def _lines(path: Path) -> Iterator[str]:
    """ConfigError: the file cannot be read."""
    try:
        with path.open("rb") as raw:
            is_zipped = raw.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        with (gzip.open if is_zipped else open)(path, "rt", encoding="utf-8-sig") as lines:
            yield from lines
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(f"workload {path} cannot be read: {error}") from None


def _fields(line: str) -> list[str]:
    return [field.strip() for field in next(csv.reader([line]), [])]


def _read_csv(path: Path, columns: Sequence[str], time_s: Callable[[Any, str], float]) -> Workload:
    lines = enumerate(_lines(path), 1)
    header = _fields(next(lines, (1, ""))[1])
    if missing := [name for name in columns if name not in header]:
        raise ConfigError(
            f"{path}, line 1: the header must name {', '.join(columns)}; "
            f"{' and '.join(missing)} missing from {','.join(header)[:80]!r}"
        )
    places = [header.index(name) for name in columns]

    def row(line: str) -> _Row:
        fields = _fields(line)
        if len(fields) != len(header):
            raise _BadRow(f"{len(fields)} fields, the header has {len(header)}")
        time, prompt, output = (fields[place] for place in places)
        return time_s(time, columns[0]), _count(prompt, columns[1]), _count(output, columns[2]), ()

    return _workload(path, _parsed(path, lines, row))


def _parsed(
    path: Path, lines: Iterable[tuple[int, str]], row: Callable[[str], _Row]
) -> Iterator[_Row]:
    for number, line in lines:
        if line.isspace():
            continue
        try:
            yield row(line)
        except _BadRow as bad:
            raise ConfigError(f"{path}, line {number}: {bad}") from None


def _workload(path: Path, rows: Iterable[_Row]) -> Workload:
    arrivals = [
        Arrival(time_s=time, prompt_tokens=prompt, output_tokens=output, prefix_hashes=hashes)
        for time, prompt, output, hashes in rows
    ]
    arrivals.sort(key=lambda a: a.time_s)
    name = path.name.removesuffix(".gz")
    return Workload(name=name, arrivals=tuple(arrivals))


def _timestamp(value: str, name: str) -> float:
    try:
        time = datetime.fromisoformat(value)
    except ValueError:
        raise _BadRow(
            f"{name} must be a time such as 2023-11-16 18:17:03.979960, got {value!r}"
        ) from None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _seconds(value: Any, name: str) -> float:
    """Of a number, or of its text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise _BadRow(f"{name} must be a number of at least 0, got {value!r}")
    return number


def _count(value: Any, name: str) -> int:
    """Of a whole number, or of its text."""
    try:
        number = 0 if isinstance(value, bool | float) else int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise _BadRow(f"{name} must be a whole number of at least 1, got {value!r}")
    return number


def _hashes(value: Any, prompt_tokens: int) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(type(h) is int for h in value):
        raise _BadRow(f"hash_ids must be a list of whole numbers, got {str(value)[:40]!r}")
    expected = ceil_div(prompt_tokens, PREFIX_BLOCK_TOKENS)
    if value and len(value) != expected:
        raise _BadRow(
            f"hash_ids has {len(value)} entries; {prompt_tokens} prompt tokens are {expected} "
            f"blocks of {PREFIX_BLOCK_TOKENS}"
        )
    return tuple(value)
