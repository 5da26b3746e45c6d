"""`spectrum`: what a run changed, weight by weight, and how two runs' directions lie to each other.

run -> base and adapter -> the change of every weight -> spectra; OTHER likewise -> phi(i, j) of the two
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith import api
from tunesmith.adapters import Adapter
from tunesmith.adapters.peft_format import adapter_folder
from tunesmith.errors import AdapterError
from tunesmith.evaluate.changes import compared, directions, spectra
from tunesmith.model.load import open_weights
from tunesmith.prepare import Loaded


def spectrum(
    target: str | Path, *, base: str | None = None, against: str | Path | None = None, weights: bool = False
) -> dict[str, Any]:
    """Report the spectrum of what a run or an adapter changed: `weights`, and means over `layers` and `modules`.

    `against`: a second one, of another rank, seed or method; `similarity` then says how far their directions agree.
    `weights=True` also holds each change against W itself (amplification), an SVD of every W. Raises AdapterError for
    what holds no adapter, or changes no weight.
    """
    loaded, adapter = _load(target, base)
    report = {"target": str(target), **_with(loaded, adapter, spectra, against_weights=weights)}
    if against is None:
        return report
    first = _with(loaded, adapter, directions)
    del loaded, adapter  # one model at a time
    second = _with(*_load(against, base), directions)
    return {**report, "against": str(against), "similarity": compared(first, second)}


def _load(target: str | Path, base: str | None) -> tuple[Loaded, Adapter]:
    folder = adapter_folder(Path(target))
    if folder is None:
        raise AdapterError(f"{target}: holds no adapter; give a run folder or an adapter folder")
    loaded = api.load(base, adapter=folder) if base is not None else api.load(target)
    return loaded, loaded.adapters["default"]


def _with(loaded: Loaded, adapter: Adapter, function: Any, **options: Any) -> Any:
    """Call `function(model, adapter, original)`; weights that were trained in place are read again from the base."""
    stored = open_weights(loaded.path)

    def original(name: str) -> Tensor:
        return stored.read(name, torch.float32)

    try:
        return function(loaded.model, adapter, original, **options)
    finally:
        stored.close()
