"""What a cell's folder holds beside the run: written once it is over, read to make the report.

CELL/result.json      figures, samples, the SHA-256 of every file that the report reads, and its own; written last
CELL/outcomes.json    each figure row by row: {"accuracy": {"values": [...], "weights": [...]}}
CELL/failed.json      why there is no result: diverged, out of memory, refused, killed, error
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.errors import DamagedRun
from tunesmith.evaluate.outcomes import Outcomes
from tunesmith.files import atomic_write_json, sha256_file

FORMAT = 1
RESULT, OUTCOMES, FAILED = "result.json", "outcomes.json", "failed.json"
SEALED = ("config.yaml", "metrics.jsonl", "before.json", "verify.json", OUTCOMES)
SEAL = "sha256"  # the key of result.json that holds the hash of all its others


@dataclass(frozen=True)
class Measured:
    """A figure of a cell: its value on `count` items, which `items` (a hash) tells from others.

    `of` is the set's name (empty: the run's own rows); `forgetting` says that the set is there to show what was lost.
    """

    value: float
    count: int
    higher_is_better: bool
    of: str = ""
    items: str = ""
    interval: tuple[float, float] | None = None
    forgetting: bool = False


@dataclass(frozen=True)
class Result:
    """What a cell has to show. `used`: examples, rate and other plain facts; `valid`: the run's own measures."""

    key: str
    role: str
    figures: Mapping[str, Measured] = field(default_factory=dict)
    used: Mapping[str, Any] = field(default_factory=dict)
    valid: Mapping[str, float] = field(default_factory=dict)
    samples: Sequence[Mapping[str, str]] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Failure:
    """Why a cell has no result."""

    kind: str
    error: str


def write_result(folder: Path, result: Result, outcomes: Mapping[str, Outcomes]) -> None:
    """Write outcomes, then the result with the hashes of itself and of all that is read with it. Raises DiskError."""
    atomic_write_json(folder / OUTCOMES, {name: asdict(one) for name, one in outcomes.items()})
    files = {name: sha256_file(folder / name) for name in SEALED if (folder / name).is_file()}
    (folder / FAILED).unlink(missing_ok=True)
    body = {"format": FORMAT, "files": files, **asdict(result)}
    atomic_write_json(folder / RESULT, {**body, SEAL: _seal_of(body)})


def write_failure(folder: Path, key: str, failure: Failure) -> None:
    """Write why a cell failed. Raises DiskError."""
    atomic_write_json(folder / FAILED, {"format": FORMAT, "key": key, **asdict(failure)})


def read_result(folder: Path, key: str) -> Result | Failure | None:
    """The cell's result or failure; None where it is not over. Raises DamagedRun."""
    if (folder / RESULT).is_file():
        return _result(folder, key)
    if (folder / FAILED).is_file():
        found = read_object(folder / FAILED)
        _check_key(found, key, FAILED)
        return _of(lambda: Failure(str(found["kind"]), str(found["error"])), FAILED)
    return None


def read_outcomes(folder: Path) -> dict[str, Outcomes]:
    """Each figure row by row. Raises DamagedRun."""
    found = read_object(folder / OUTCOMES)

    def parse() -> dict[str, Outcomes]:
        return {
            str(name): Outcomes(tuple(map(float, one["values"])), tuple(map(float, one["weights"])))
            for name, one in found.items()
        }

    outcomes = _of(parse, OUTCOMES)
    for name, one in outcomes.items():
        whole = len(one.values) == len(one.weights) > 0 and all(map(math.isfinite, (*one.values, *one.weights)))
        if not whole or math.fsum(one.weights) <= 0:
            raise DamagedRun(f"{OUTCOMES}: the rows of {name} are not whole")
    return outcomes


def _result(folder: Path, key: str) -> Result:
    found = read_object(folder / RESULT)
    _check_key(found, key, RESULT)
    _check_seal(found)

    def parse() -> tuple[Result, dict[str, str]]:
        figures = {str(name): _measured(one) for name, one in found["figures"].items()}
        valid = {str(name): float(value) for name, value in found["valid"].items()}
        samples = [{str(k): str(v) for k, v in sample.items()} for sample in found["samples"]]
        notes = [str(note) for note in found["notes"]]
        files = {str(name): str(digest) for name, digest in found["files"].items()}
        return Result(key, str(found["role"]), figures, dict(found["used"]), valid, samples, notes), files

    result, files = _of(parse, RESULT)
    for name, digest in files.items():
        if name not in SEALED:
            raise DamagedRun(f"{RESULT}: names a file {name[:60]!r} that no cell has")
        if not (folder / name).is_file():
            raise DamagedRun(f"{name}: is missing")
        if sha256_file(folder / name) != digest:
            raise DamagedRun(f"{name}: its SHA-256 differs from what was written")
    return result


def _seal_of(body: Mapping[str, Any]) -> str:
    """SHA-256 of the body, however its file is spaced and its keys are ordered."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _measured(one: Mapping[str, Any]) -> Measured:
    ends = one["interval"]
    value, interval = float(one["value"]), None if ends is None else (float(ends[0]), float(ends[1]))
    if not all(map(math.isfinite, (value, *(interval or ())))):
        raise ValueError("a figure is not finite")
    flags = bool(one["higher_is_better"]), bool(one["forgetting"])
    return Measured(value, int(one["count"]), flags[0], str(one["of"]), str(one["items"]), interval, flags[1])


def _check_key(found: Mapping[str, Any], key: str, name: str) -> None:
    if found.get("format") != FORMAT:
        raise DamagedRun(f"{name}: was written in another format")
    if found.get("key") != key:
        raise DamagedRun(f"{name}: belongs to other settings or data")


def _check_seal(found: Mapping[str, Any]) -> None:
    if SEAL not in found:  # written by an earlier version
        return
    body = {name: value for name, value in found.items() if name != SEAL}
    if found[SEAL] != _of(lambda: _seal_of(body), RESULT):
        raise DamagedRun(f"{RESULT}: its SHA-256 differs from what was written")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises DamagedRun."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise DamagedRun(f"{path.name}: not readable") from None
    if not isinstance(found, dict):
        raise DamagedRun(f"{path.name}: not readable")
    return found


def _of(parse: Any, name: str) -> Any:
    try:
        return parse()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError):
        raise DamagedRun(f"{name}: keys are missing, or values are of the wrong type") from None
