"""Names of modules in PEFT's files: those that this model has, and names that select given modules in PEFT as well."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from tunesmith.errors import AdapterError

logger = logging.getLogger(__name__)


def known_names(names: Sequence[str], paths: Collection[str], where: str, what: str = "linear module") -> list[str]:
    """The names that one of `paths` ends in: files list names of other architectures too, and PEFT lets them.

    The others are passed over with a warning. Raises AdapterError where none is left.
    """
    ends = {end for path in paths for end in _ends(path)}
    known = [name for name in names if name in ends]
    if len(known) < len(names):
        strange = ", ".join(sorted(set(names) - set(known)))
        if not known:
            raise AdapterError(f"{where}: target_modules: none of {strange[:120]} is a {what} of this model")
        logger.warning("%s: target_modules: %s: no such module in this model, passed over", where, strange[:120])
    return known


def short_names(chosen: Collection[str], among: Collection[str]) -> list[str] | None:
    """The last names of the paths `chosen`, or None where those would select others of `among` too."""
    names = {path.rpartition(".")[2] for path in chosen}
    selected = {path for path in among if path.rpartition(".")[2] in names}
    return sorted(names) if selected == set(chosen) else None


def _ends(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
