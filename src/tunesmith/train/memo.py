"""What a step was found to hold, kept on the disk.

Counting it anew runs blocks on the meta device, for which torch imports its compiler: three seconds before a first step
that a second run of the same settings on the same rows need not wait for. A count is named by the hash of all that it
depends on; those of another state of this package's source, or of another torch, are removed.

    CACHE/plans/1f0c.../93ab....json     {"kept": bytes, "loss": bytes, "peak": bytes, "end": bytes, "first": false}
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch

import tunesmith
from tunesmith.data.pack import Pack
from tunesmith.errors import TunesmithError
from tunesmith.files import atomic_write_json
from tunesmith.hardware import cache_dir
from tunesmith.model.llama import Llama
from tunesmith.train.simulate import StepBytes


class Memo:
    """Counts for one model with its adapter; `settings`: whatever else they depend on, as `repr` tells it apart."""

    def __init__(self, model: Llama, *settings: object, root: Path | None = None) -> None:
        self._folder = (root or cache_dir() / "plans") / _stamp()
        self._makeup = _digest(torch.get_num_threads(), *settings, *_makeup(model))  # each has scratch space

    def step(self, pack: Pack, *how: object, count: Callable[[], StepBytes]) -> StepBytes:
        """What `count` finds, or found before, for this pack."""
        path = self._folder / f"{_digest(self._makeup, how, *_shape(pack))[:32]}.json"
        found = _read(path)
        if found is None:
            found = count()
            self._keep(path, found)
        return found

    def _keep(self, path: Path, found: StepBytes) -> None:
        try:
            if not self._folder.is_dir():
                shutil.rmtree(self._folder.parent, ignore_errors=True)
                self._folder.mkdir(parents=True, exist_ok=True)
            atomic_write_json(path, asdict(found))
        except (OSError, TunesmithError):
            return  # it is counted again the next time


def _read(path: Path) -> StepBytes | None:
    """A count that is whole; None where there is none."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        found = StepBytes(**told)
    except (OSError, ValueError, TypeError):
        return None
    return found if all(type(told[name]) is int for name in ("kept", "loss", "peak", "end")) else None


def _digest(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()


def _makeup(model: Llama) -> Iterator[object]:
    """The kinds and shapes of all that the model consists of, its adapters' parts included."""
    yield from (model.config, model.pattern)
    yield from ((name, type(module).__qualname__) for name, module in model.named_modules())
    yield from ((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters())
    yield from ((name, tuple(b.shape), b.dtype) for name, b in model.named_buffers())


def _shape(pack: Pack) -> Iterator[object]:
    layout = pack.layout
    yield from (layout.starts, layout.lengths, layout.parents)
    yield None if layout.answer_ends is None else layout.answer_ends.tolist()
    yield [picture is not None for picture in layout.pictures]
    yield from (tuple(t.shape) for t in (pack.tokens, pack.read, pack.target, pack.weight))


@cache
def _stamp() -> str:
    """Tells states of the source from one another, and torch's versions."""
    root = Path(tunesmith.__file__).parent
    files = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".cpp"))
    return _digest(
        torch.__version__, *((str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    )[:16]
