"""Verify that what was saved does what was trained.

gather the evidence: files, base, tokenizer, a fresh process that loads base and adapter and computes the probe's rows
hold it against CHECKS, a table of small functions, each as soon as it can -> VerifyReport -> RUN/verify.json
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from tunesmith import __version__
from tunesmith.adapters.outside import opened_files
from tunesmith.adapters.peft_config import read_tensors
from tunesmith.adapters.peft_format import read_info
from tunesmith.config.source import read as read_yaml
from tunesmith.data.catalog import resolve_model
from tunesmith.errors import AdapterError, TunesmithError, VerificationError
from tunesmith.export.checks import CHECKS, Check, Evidence
from tunesmith.export.child import Child
from tunesmith.export.probe import PROBE, Probe, built_in_rows, make_probe, read_probe, write_probe
from tunesmith.export.replay import Answer, Request, replay, replay_in_child
from tunesmith.files import atomic_write_json
from tunesmith.model.load import load_config, model_identity
from tunesmith.model.random_weights import RANDOM
from tunesmith.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Check", "VerifyReport", "verify_adapter", "verify_path", "verify_run", "write_probe"]

T = TypeVar("T")


@dataclass(frozen=True)
class VerifyReport:
    """What was checked about an adapter, with which versions, and when (UTC)."""

    folder: Path
    checks: tuple[Check, ...]
    versions: Mapping[str, str]
    when: str

    @property
    def passed(self) -> bool:
        """Did every check hold?"""
        return all(check.ok for check in self.checks)

    def first_failure(self) -> str:
        """The first check that failed, what was seen and what to do, in one line; empty where all held."""
        failed = next((check for check in self.checks if not check.ok), None)
        return f"{failed.name}: {failed.detail}; {failed.cure}" if failed else ""

    def raise_if_failed(self) -> None:
        """Raise VerificationError with the first failure."""
        if not self.passed:
            raise VerificationError(f"{self.folder}: {self.first_failure()}")

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON: {"ok", "checks": [{"name", "ok", "detail", "cure"}], "versions", "when"}."""
        checks = [asdict(check) for check in self.checks]
        return {"ok": self.passed, "checks": checks, "versions": dict(self.versions), "when": self.when}


def verify_run(
    run: Path, *, base: str | Path | None = None, fresh: bool = True, child: Child | None = None
) -> VerifyReport:
    """Verify RUN/adapter against RUN/verify_probe.safetensors and write RUN/verify.json.

    `base` is the base model's folder, file or name; without it, the one that the run's configuration names.
    `fresh=False` loads in this process instead of a new one; `child` is a new one that waits (`fresh_process`).
    Raises AdapterError for a folder that is no run, CatalogError for a base that cannot be found; what fails a check
    is in the report.
    """
    run = Path(run)
    adapter = run / "adapter"
    if not adapter.is_dir():
        raise AdapterError(
            f"{run}: holds no adapter/ folder: not a finished run; go on with tunesmith train --resume {run}"
        )
    settings = read_yaml(run / "config.yaml").get("model", {}) if (run / "config.yaml").is_file() else {}
    if base is None and (run / "base" / RANDOM).is_file():
        found = run / "base"  # it began from random weights
    elif base is None:
        found = _resolve(settings.get("path") or read_info(adapter).base, settings.get("revision"), run)
    else:
        found = resolve_model(base)
    recorded = _try(lambda: read_probe(run / PROBE))
    report = _verify(run, adapter, found, recorded, fresh, settings.get("dtype"), child)
    atomic_write_json(run / "verify.json", report.to_dict())
    return report


def verify_adapter(folder: Path, base: str | Path | None = None, *, fresh: bool = True) -> VerifyReport:
    """Verify any adapter folder, of ours or of PEFT, with its base (without one: the one that the folder names).

    There is nothing to compare logits with, so they are only required to be finite and to differ from the base's on
    built-in rows. Raises AdapterError, CatalogError.
    """
    folder = Path(folder)
    found = _resolve(read_info(folder).base, None, folder) if base is None else resolve_model(base)
    return _verify(folder, folder, found, (None, None), fresh, None)


def verify_path(path: Path, base: str | Path | None = None, *, fresh: bool = True) -> VerifyReport:
    """Verify a run folder or an adapter folder, whichever `path` is; `base` may be a name of the catalog."""
    path = Path(path)
    if (path / "adapter").is_dir() or (path / "config.yaml").is_file():
        return verify_run(path, base=base, fresh=fresh)
    return verify_adapter(path, base, fresh=fresh)


def _verify(
    subject: Path,
    adapter: Path,
    base: Path,
    recorded: tuple[Probe | None, str | None],
    fresh: bool,
    dtype: Any,
    child: Child | None = None,
) -> VerifyReport:
    probe, no_probe = recorded
    info, no_info = _try(lambda: read_info(adapter))
    tensors, no_tensors = _try(lambda: read_tensors(info.weights)) if info else (None, no_info)
    identity, no_base = _try(lambda: model_identity(base))
    config, _ = _try(lambda: load_config(base))

    def replayed(reading: Future[tuple[Tokenizer | None, str | None]]) -> tuple[Answer | None, str | None]:
        rows = probe or (make_probe(built_in_rows(reading.result()[0], config)) if config else None)
        if info is None or identity is None or rows is None:
            return None, no_info or no_base
        request = _request(base, adapter, probe, dtype)
        return _try(lambda: replay_in_child(request, rows, child) if fresh else replay(request, rows))

    with ThreadPoolExecutor(2 + len(CHECKS)) as pool:  # what needs no answer is judged while the fresh process works
        reading = pool.submit(_try, lambda: load_tokenizer(base))
        answering = pool.submit(replayed, reading)
        tokenizer, no_tokenizer = reading.result()
        evidence = Evidence(
            adapter=adapter,
            base=base,
            info=info,
            tensors=tensors,
            tensors_error=no_tensors,
            identity=identity,
            identity_error=no_base,
            config=config,
            tokenizer=tokenizer,
            tokenizer_error=no_tokenizer,
            probe=probe,
            probe_error=no_probe,
            replayed=answering,
            fresh=fresh,
            run_dtype=dtype if isinstance(dtype, str) else None,
        )
        made = list(pool.map(lambda make: make(evidence), CHECKS))
    checks = tuple(replace(check, cure="" if check.ok else check.cure) for check in made if check is not None)
    versions = {"tunesmith": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return VerifyReport(subject, checks, versions, datetime.now(UTC).isoformat(timespec="seconds"))


def _request(base: Path, adapter: Path, probe: Probe | None, dtype: Any) -> Request:
    """Load as the live model was: its dtype, device and threads."""
    made = probe.made if probe and probe.made else {}
    device = made.get("device", "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        device = "cpu"
    threads = int(made.get("threads", torch.get_num_threads()))
    methods = tuple(map(str, opened_files()))
    return Request(str(base), str(adapter), made.get("dtype", "float32"), device, threads, methods)


def _try(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """The result of `work`, or the one line it failed with."""
    try:
        return work(), None
    except TunesmithError as error:
        return None, str(error)


def _resolve(named: Any, revision: Any, where: Path) -> Path:
    if not isinstance(named, str) or not named:
        raise AdapterError(f"{where}: does not name its base model; give it with --base")
    return resolve_model(named, revision=revision if isinstance(revision, str) else None)
