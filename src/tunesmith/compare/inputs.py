"""What cells depend on beside their settings: the content of everything that settings name.

Changed content makes other cells, so that nothing stale is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tunesmith.compare.grid import Grid
from tunesmith.data.catalog import resolve_data
from tunesmith.files import sha256_file
from tunesmith.model.load import model_identity


def input_hashes(grid: Grid, methods: Sequence[Path]) -> dict[str, str]:
    """By name, a hash of all data, of the methods' own files, of templates and other files, and of local bases."""
    found = data_hashes(grid.paths(), resolve_data)
    found |= {f"method {path.name}": sha256_file(path) for path in methods}
    found |= data_hashes([name for name in grid.files() if Path(name).expanduser().exists()], _plain)
    bases = {str(cell.run.model.path) for cell in grid.cells if cell.run.model.init != "random"}
    for name in sorted(name for name in bases if _plain(name).exists()):
        found[f"base {name}"] = model_identity(_plain(name))["sha256"]
    return found


def data_hashes(names: Sequence[str], resolve: Callable[[str], Path]) -> dict[str, str]:
    """SHA-256 of what `resolve` finds at each name: a file, or a folder with all that is in it."""
    found = {}
    for name in names:
        path = Path(resolve(name))
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        listed = [(str(file.relative_to(path)) if path.is_dir() else file.name, sha256_file(file)) for file in files]
        found[name] = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return found


def _plain(name: str) -> Path:
    return Path(name).expanduser()
