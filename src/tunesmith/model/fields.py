"""Read JSON files and single values of somebody else's metadata, refusing absurd ones by key and value."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError, TunesmithError, did_you_mean

_MOST_JSON = 64 << 20


class Fields:
    """Typed access to a mapping that somebody else wrote; every error names `where`, the key and the value.

    JSON's null counts as absent. A `default` of None means that the key is required.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def count(self, key: str, default: int | None = None, *, least: int = 1, most: int = 1 << 31) -> int:
        """Return an integer in [least, most]."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._bad(key, value, f"an integer from {least} to {most}")
        return value

    def optional_count(self, key: str, default: int | None, *, most: int = 1 << 31) -> int | None:
        """Return a positive integer or None; an explicit null is None, whatever the default."""
        if key in self.values and self.values[key] is None:
            return None
        return default if key not in self.values else self.count(key, most=most)

    def number(self, key: str, default: float | None = None, *, least: float = 0.0, most: float = 1e30) -> float:
        """Return a finite number in [least, most], zero excluded."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._bad(key, value, "a finite number")
        if not least <= value <= most or value == 0:
            raise self._bad(key, value, f"a number from {least:g} to {most:g}, not 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._bad(key, value, "true or false")
        return value

    def token(self, key: str, default: int | None) -> int | None:
        """Return a token id or None. Older configs write -1 for "none"."""
        value = self.values.get(key, default)
        if value is None or value == -1:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._bad(key, value, "a token id")
        return value

    def tokens(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Return a tuple of token ids from one id, a list of ids or null."""
        value = self.values.get(key, default)
        if value is None:
            return ()
        ids = tuple(value) if isinstance(value, list | tuple) else (value,)
        if len(ids) > 1000 or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self._bad(key, value, "a token id or a list of them")
        return ids

    def names(self, key: str, known: Collection[str], length: int) -> tuple[str, ...] | None:
        """Return `length` names out of `known`, or None where the key is absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) != length or any(name not in known for name in value):
            raise self._bad(key, value, f"{length} of {', '.join(known)}")
        return tuple(value)

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.where}: {key} is missing{did_you_mean(key, map(str, self.values))}")
        return value

    def _bad(self, key: str, value: Any, wanted: str) -> ModelError:
        return ModelError(f"{self.where}: {key}={str(value)[:60]!r}; {wanted} is needed")


def shortest(value: float) -> float:
    """Return the shortest decimal that is the same float32: GGUF keeps 1e-5 as 9.999999747378752e-06."""
    single = struct.unpack("<f", struct.pack("<f", value))[0]
    for digits in range(1, 10):
        text = f"{single:.{digits}g}"
        if struct.unpack("<f", struct.pack("<f", float(text)))[0] == single:
            return float(text)
    return float(single)


def read_json(path: Path, error: type[TunesmithError] = ModelError) -> Any:
    """Return the content of a JSON file of somebody else's; `error`, in one line, where it cannot be read."""
    try:
        if path.stat().st_size > _MOST_JSON:
            raise error(f"{path}: {path.stat().st_size} bytes are more than a file of settings has ({_MOST_JSON})")
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: no such file; is this the model's folder?") from None
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{path}: not readable as JSON ({str(reason)[:120]}); download it again") from None
