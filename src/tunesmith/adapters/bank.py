"""A bank: many LoRA adapters on one model at once, of which a batch pays only for those that it uses.

    y + B_j A_j x      for the rows that chose member j;    A: (members, rank, in), B: (members, out, rank), scale in B

One delta a Linear holds all members' A and B, padded to the largest rank. Rows with a member of their own (decoding)
gather their A and B; rows sorted by member (prompts) take them slice by slice. Members are routed to by their names, as
adapters are (`generate(routes=...)`), and act only where they are named. A bank is for use, not for training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tunesmith.adapters.base import Adapter, Delta, uninstall
from tunesmith.adapters.lora import LoRADelta
from tunesmith.adapters.peft_format import load_adapter
from tunesmith.errors import AdapterError, did_you_mean
from tunesmith.model.linear import Linear
from tunesmith.model.llama import Llama
from tunesmith.model.seam import Context, Seam

GATHERED = 4  # rows of a member, on average, below which gathering its A and B for each row is faster than slicing


class Members(Delta):
    """The names that a bank's members are routed to by, with their places in it; it stands in `model.embed`."""

    def __init__(self) -> None:
        super().__init__()
        self.members: dict[str, int] = {}

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Any) -> Tensor:
        """Nothing is edited here."""
        return value


class BankDelta(Delta):
    """y + B_j A_j x on one Linear; `ranks` are the members' own here, 0 where a member does not act on this Linear."""

    A: Tensor
    B: Tensor

    def __init__(self, linear: Linear, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("A", torch.zeros(0, 0, linear.in_features, dtype=dtype, device=device))
        self.register_buffer("B", torch.zeros(0, linear.out_features, 0, dtype=dtype, device=device))
        self.ranks: list[int] = []

    def reserve(self, members: int, rank: int = 0) -> None:
        """Make room for so many members, of up to this rank."""
        more, wider = max(0, members - len(self.A)), max(0, rank - self.A.shape[1])
        if more or wider:
            self.A = functional.pad(self.A, (0, 0, 0, wider, 0, more))
            self.B = functional.pad(self.B, (0, wider, 0, 0, 0, more))
            self.ranks += [0] * more

    def put(self, slot: int, A: Tensor, B: Tensor) -> None:
        """Let the member at `slot` have A (rank, in) and B (out, rank)."""
        self.reserve(slot + 1, len(A))
        self.A[slot, : len(A)], self.B[slot, :, : len(A)] = A.to(self.A), B.to(self.B)
        self.ranks[slot] = len(A)

    def clear(self, slot: int) -> None:
        """Take the member at `slot` out."""
        self.A[slot], self.B[slot], self.ranks[slot] = 0, 0, 0

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        """value (tokens, out) and the Linear's input `given` (tokens, in) -> (tokens, out)."""
        chosen = ctx.choice.get(self.adapter)
        if chosen is None:
            return value
        if len(chosen.groups) == 1 and len(chosen.rows) == len(given):  # one member on all rows: nothing to pick out
            slot, _ = chosen.groups[0]
            rank = self.ranks[slot]
            return torch.addmm(value, functional.linear(given, self.A[slot, :rank]), self.B[slot, :, :rank].t())
        x = given[chosen.rows]
        if len(chosen.rows) < GATHERED * len(chosen.groups):
            A, B = self.A[chosen.index], self.B[chosen.index]  # (rows, rank, in), (rows, out, rank)
            change = torch.bmm(B, torch.bmm(A, x[:, :, None]))[:, :, 0]
        else:
            counts = [count for _, count in chosen.groups]
            parts = zip(chosen.groups, x.split(counts), strict=True)
            change = torch.cat([self._member(slot, rows) for (slot, _), rows in parts])
        return value.index_add(0, chosen.rows, change)

    def _member(self, slot: int, x: Tensor) -> Tensor:
        rank = self.ranks[slot]
        return functional.linear(functional.linear(x, self.A[slot, :rank]), self.B[slot, :, :rank])


class Bank:
    """A bank attached to `model` under a name; its members come and go while the model is in use."""

    def __init__(self, model: Llama, name: str = "bank") -> None:
        if not name.isidentifier() or hasattr(Seam, name):
            raise AdapterError(f"bank name {name!r}: use letters, digits and _, and no word of Python's dictionaries")
        if name in _names(model):
            raise AdapterError(f"bank {name!r}: an adapter has this name already; choose another")
        self.model, self.name = model, name
        self._members = Members()
        self._members.adapter = name
        self._deltas: dict[str, BankDelta] = {}
        self._room = 0  # members that every delta has room for
        model.model.embed[name] = self._members

    @property
    def members(self) -> list[str]:
        """Names of the members, sorted."""
        return sorted(self._members.members)

    def add(self, adapter: Adapter) -> None:
        """Take a LoRA adapter off the model and into the bank, under its own name.

        Raises AdapterError for another method, and for LoRA that trains more than linears' A and B.
        """
        factors = _factors(adapter)
        if adapter.name in self._members.members:
            raise AdapterError(f"bank {self.name!r} has a member {adapter.name!r} already; remove it first")
        uninstall(self.model, adapter)
        slot = _free(self._members.members)
        if slot >= self._room:
            self._room = max(4, 2 * self._room)  # doubled, so that adding many copies little
            for delta in self._deltas.values():
                delta.reserve(self._room)
        for path, (A, B) in factors.items():
            self._delta(path).put(slot, A, B)
        self._members.members[adapter.name] = slot

    def load(self, name: str, folder: Path, identity: Mapping[str, Any] | None = None) -> None:
        """Add the LoRA adapter saved in `folder` under `name`. Raises AdapterError; see `load_adapter`."""
        if name in _names(self.model):
            raise AdapterError(f"bank {self.name!r}: an adapter has the name {name!r} already; choose another")
        adapter = load_adapter(folder, self.model, name, identity=identity)
        try:
            self.add(adapter)
        except AdapterError:
            if not adapter.base:
                uninstall(self.model, adapter)
            raise

    def remove(self, name: str) -> None:
        """Take a member out. Raises AdapterError where there is none of this name."""
        if name not in self._members.members:
            raise AdapterError(
                f"bank {self.name!r} has no member {name!r}{did_you_mean(name, self.members)} (members: "
                f"{', '.join(self.members) or 'none'})"
            )
        slot = self._members.members.pop(name)
        for delta in self._deltas.values():
            delta.clear(slot)

    def close(self) -> None:
        """Take the bank and its members off the model."""
        for path in self._deltas:
            del _linear(self.model, path).edit[self.name]
        del self.model.model.embed[self.name]
        self._deltas.clear()
        self._members.members.clear()
        self._room = 0

    def _delta(self, path: str) -> BankDelta:
        """The bank's delta on the Linear at `path`, made where it is needed first."""
        if path not in self._deltas:
            linear = _linear(self.model, path)
            delta = BankDelta(linear, self.model.dtype, self.model.device).train(self.model.training)
            delta.adapter = self.name
            delta.reserve(self._room)
            self._deltas[path] = linear.edit[self.name] = delta
        return self._deltas[path]


def fits(adapter: Adapter) -> bool:
    """Is this plain LoRA on linears, which a bank can hold?"""
    plain = all(type(delta) is LoRADelta for delta in adapter.deltas.values())
    return plain and bool(adapter.deltas) and not adapter.base


def _factors(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """A, and B with the scale in it, by path of the Linear. Raises AdapterError for what is not plain LoRA."""
    found = {}
    for place, delta in adapter.deltas.items():
        if type(delta) is not LoRADelta:  # what is built upon it, such as DoRA, computes something else
            raise AdapterError(
                f"adapter {adapter.name!r} ({adapter.kind}): a bank holds LoRA's A and B on linears, and {place} is "
                "edited otherwise; attach it beside the bank"
            )
        A, B = delta.factors()
        found[place.removesuffix(".edit")] = A.detach(), delta.scale * B.detach()
    if adapter.base or not found:
        raise AdapterError(
            f"adapter {adapter.name!r} ({adapter.kind}) trained the base's own weights, which every member would have; "
            "load it on a base of its own"
        )
    return found


def _linear(model: Llama, path: str) -> Linear:
    module = model.get_submodule(path)
    if not isinstance(module, Linear):
        raise AdapterError(f"{path}: no linear module of this model")
    return module


def _names(model: Llama) -> set[str]:
    """Every name that is taken: of attached adapters, of banks, of their members."""
    taken = {name for module in model.modules() if isinstance(module, Seam) for name in module}
    return taken.union(*(delta.members for delta in model.model.embed.values() if isinstance(delta, Members)))


def _free(members: Mapping[str, int]) -> int:
    """The first place that no member has."""
    return next(slot for slot in range(len(members) + 1) if slot not in members.values())
