"""Mixed: two or more methods trained together and saved as one adapter, such as prefix tuning with LoRA.

    adapter: {kind: mixed, parts: [{kind: prefix, virtual_tokens: 10}, {kind: lora, rank: 8}]}

Where two parts edit the same value, the first edits first: value -> part 1 -> part 2. They act as one: LLaMA-Adapter's
prompts go through projections that the other parts edit, as in its second version. Each part keeps its own learning
rate: parameters of part p move at `train.learning_rate` x (default of p) / (default of LoRA).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tunesmith.adapters import find_method
from tunesmith.adapters.base import Adapter, Delta, Method, Placement, Stepwise, Worded
from tunesmith.config import STRICT, validate_section
from tunesmith.errors import AdapterError, CannotMerge, ConfigError
from tunesmith.model.layout import Layout
from tunesmith.model.linear import Linear
from tunesmith.model.llama import Llama
from tunesmith.model.seam import Context
from tunesmith.model.sight import Look

KIND = "mixed"
FOLD_TOLERANCE = 1e-9  # of the largest output, in float64


@plain_dataclass(frozen=True)
class Part:
    """One of the methods, under the name that its parameters' paths carry."""

    name: str
    method: Method
    settings: Any

    def as_given(self) -> dict[str, Any]:
        """What one writes under `parts:` to have it, with every setting."""
        settings = TypeAdapter(type(self.settings)).dump_python(self.settings, mode="json")
        return {"name": self.name, "kind": self.method.kind, **settings}

    @property
    def trains_base(self) -> bool:
        """Does it train base weights?"""
        found = getattr(self.method, "trains_base", False)
        return bool(found(self.settings) if callable(found) else found)


def _part(given: Mapping[str, Any], where: str) -> Part:
    """Raises ConfigError for a kind or a setting that is not known."""
    method = find_method(str(given.get("kind", "lora")))
    name = given.get("name", method.kind)
    if method.kind == KIND:
        raise ConfigError(f"{where}: a mixed method within a mixed one; list all parts side by side")
    if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise ConfigError(f"{where}.name: {str(name)[:40]!r}: use letters, digits and _, and no word of a dictionary's")
    rest = {key: value for key, value in given.items() if key != "name"}
    return Part(name, method, validate_section(method.settings, rest, where))


def _resolved(parts: tuple[Mapping[str, Any], ...]) -> tuple[Mapping[str, Any], ...]:
    """The same parts with a name and every setting written out. Raises ConfigError."""
    if len(parts) < 2:
        raise ConfigError("adapter.parts: at least two methods are mixed; for one, write its own kind")
    found: list[dict[str, Any]] = []
    for number, given in enumerate(parts):
        part = _part(given, f"adapter.parts[{number}]")
        others = [entry["name"] for entry in found]
        if "name" not in given and part.name in others:
            part = Part(f"{part.name}_{number + 1}", part.method, part.settings)
        if part.name in others:
            raise ConfigError(f"adapter.parts[{number}].name: {part.name!r} is taken by another part; choose another")
        found.append(part.as_given())
    return tuple(found)


Parts = Annotated[
    tuple[Mapping[str, Any], ...],
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
    AfterValidator(_resolved),
]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixedSettings:
    """Settings under `adapter:` for `kind: mixed`."""

    parts: Parts = Field(
        default=({"kind": "lora"}, {"kind": "bitfit"}),
        validate_default=True,
        description="The methods, each with its `kind`, its own settings and, if two are of a kind, a `name`.",
    )

    @cached_property
    def members(self) -> tuple[Part, ...]:
        """The parts, ready for use."""
        return tuple(_part(given, f"adapter.parts[{number}]") for number, given in enumerate(self.parts))

    @property
    def dropout(self) -> float:
        """The most that a part drops: above 0, no prefix can be shared."""
        return max(float(getattr(part.settings, "dropout", 0.0)) for part in self.members)

    @property
    def looks(self) -> tuple[Look, ...]:
        """What the parts ask image encoders for."""
        return tuple(look for part in self.members for look in getattr(part.settings, "looks", ()))

    @property
    def rank(self) -> int:
        """The parts' ranks together, for the memory plan."""
        return sum(int(getattr(part.settings, "rank", 0)) for part in self.members)


class Chain(Delta):
    """The deltas of several parts in one seam, first to last; `seam` is that of a Linear ("edit", "input") or ""."""

    def __init__(self, deltas: Mapping[str, Delta], seam: str = "") -> None:
        super().__init__()
        self.parts = nn.ModuleDict(deltas)
        self.seam = seam
        self.virtual_tokens = sum(delta.virtual_tokens for delta in deltas.values())
        self.infix_tokens = sum(delta.infix_tokens for delta in deltas.values())
        self.answer_ends = max(delta.answer_ends for delta in deltas.values())
        self.looks = tuple(dict.fromkeys(look for delta in deltas.values() for look in delta.looks))
        self.visual_tokens = sum(delta.visual_tokens for delta in deltas.values())
        self.detached = frozenset(f"parts.{name}.{key}" for name, delta in deltas.items() for key in delta.detached)

    @property
    def deltas(self) -> dict[str, Delta]:
        """The parts' deltas by name, in order."""
        return {name: delta for name, delta in self.parts.items() if isinstance(delta, Delta)}

    @property
    def adapter(self) -> str:
        """The name of the whole adapter, which every part acts under."""
        return next(iter(self.deltas.values())).adapter

    @adapter.setter
    def adapter(self, name: str) -> None:
        for delta in self.deltas.values():
            delta.adapter = name

    def forward(self, value: Any, host: nn.Module, ctx: Context, given: Any) -> Any:
        """value -> part 1 -> part 2 -> ..."""
        for delta in self.parts.values():
            value = delta(value, host, ctx, given)
        return value

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Part after part: the second folds into what the first gave.

        That is the chain's own function only where a part edits what it is given and does not look at W (DoRA does);
        it is tried out, and raises CannotMerge where it is not.
        """
        if len(self.deltas) == 1:
            return next(iter(self.deltas.values())).fold(weight, bias)
        if not self.seam:
            raise CannotMerge(f"{', '.join(self.deltas)} edit the same value, which is no Linear's: {_BESIDE}")
        wide = torch.promote_types(weight.dtype, torch.float32)
        own = weight.double(), None if bias is None else bias.double()
        new, shift = own
        for delta in reversed(self.deltas.values()) if self.seam == "input" else self.deltas.values():
            new, shift = delta.fold(new, shift)
        if not self._computes(*own, new, shift):
            raise CannotMerge(
                f"{' and '.join(self.deltas)} on one Linear: one of them looks at its weight, so that they do not fold "
                f"one after the other: {_BESIDE}"
            )
        return new.to(wide), None if shift is None else shift.to(wide)

    @torch.no_grad()
    def _computes(self, weight: Tensor, bias: Tensor | None, new: Tensor, shift: Tensor | None) -> bool:
        """Does a Linear of `new` and `shift` compute what this chain makes of one of `weight` and `bias`?"""
        with torch.device("meta"):
            host = Linear(weight.shape[1], weight.shape[0], bias is not None)
        host.weight = nn.Parameter(weight, requires_grad=False)
        host.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(2, weight.shape[1], generator=draw, dtype=torch.float64).to(weight.device)
        nowhere = x.new_zeros(2, 0)
        ctx = Context(Layout.of([2], device=weight.device), nowhere, nowhere)
        chain = copy.deepcopy(self).double().eval()
        if self.seam == "input":
            mine = nn.functional.linear(chain(x, host, ctx, None), weight, bias)
        else:
            mine = chain(nn.functional.linear(x, weight), host, ctx, x)
            mine = mine if bias is None else mine + bias
        theirs = nn.functional.linear(x, new, shift)
        return bool((mine - theirs).abs().max() <= FOLD_TOLERANCE * mine.abs().max())

    def penalty(self) -> Tensor | None:
        """The sum of the parts' penalties."""
        found = [p for delta in self.deltas.values() if (p := delta.penalty()) is not None]
        return torch.stack(found).sum() if found else None

    def after_step(self) -> None:
        """Each part's own."""
        for delta in self.deltas.values():
            delta.after_step()


_BESIDE = "keep the adapter beside its base"


class Mixed:
    """The method of `kind: mixed`."""

    kind = KIND
    settings = MixedSettings
    learning_rate = 3e-4  # LoRA's: what `train.learning_rate` is measured against

    def identity_at_init(self, settings: MixedSettings) -> bool:
        """See `Method`: where every part is."""
        return all(part.method.identity_at_init(part.settings) for part in settings.members)

    def mergeable(self, settings: MixedSettings) -> bool:
        """See `Method`: where every part is; two parts on one Linear may still refuse (see `Chain.fold`)."""
        return all(part.method.mergeable(part.settings) for part in settings.members)

    def trains_base(self, settings: MixedSettings) -> bool:
        """Does a part train base weights, which must then be held in float32?"""
        return any(part.trains_base for part in settings.members)

    def place(self, model: Llama, settings: MixedSettings) -> Iterator[Placement]:
        """Every part's deltas, those of one seam as a chain. Raises AdapterError where two parts cannot be told apart.

        Edits of a Linear's output come before those of its input: folded in this order they are exact.
        """
        found: dict[tuple[str, str], dict[str, Delta]] = {}
        for part in settings.members:
            for placement in part.method.place(model, part.settings):
                here = found.setdefault((placement.path, placement.seam), {})
                if part.name in here:
                    raise AdapterError(
                        f"{placement.path}.{placement.seam} is given two deltas: method {part.method.kind} is written "
                        "wrongly"
                    )
                here[part.name] = placement.delta
        for (path, seam), deltas in sorted(found.items(), key=lambda item: item[0][1] == "input"):
            _check_tokens(deltas)
            linear = isinstance(model.get_submodule(path), Linear)
            yield Placement(path, seam, Chain(deltas, seam if linear else ""))

    def unfreeze(self, model: Llama, settings: MixedSettings) -> Iterator[str]:
        """What the one part that trains base weights names. Raises AdapterError for two of them."""
        named = {part.name: list(part.method.unfreeze(model, part.settings)) for part in settings.members}
        training = [name for name, keys in named.items() if keys]
        if len(training) > 1:
            raise AdapterError(
                f"adapter.parts: {' and '.join(training)} both train the base's own weights; keep one of them"
            )
        return (key for keys in named.values() for key in keys)

    def lr_scale(self, name: str, settings: MixedSettings) -> float:
        """The part's own factor, times its default rate over ours."""
        before, inside, after = name.partition(".parts.")
        part_name, _, key = after.partition(".")
        if inside:
            part = next(part for part in settings.members if part.name == part_name)
            own = f"{before}.{key}"
        else:
            part = next((part for part in settings.members if part.trains_base), settings.members[0])
            own = name
        return part.method.lr_scale(own, part.settings) * part.method.learning_rate / self.learning_rate

    def with_ids(self, settings: MixedSettings, encode: Callable[[str], Sequence[int]]) -> MixedSettings:
        """See `Worded`."""
        parts = [
            Part(part.name, part.method, part.method.with_ids(part.settings, encode))
            if isinstance(part.method, Worded)
            else part
            for part in settings.members
        ]
        return MixedSettings(parts=tuple(part.as_given() for part in parts))

    def begin(self, adapter: Adapter, steps: int) -> None:
        """See `Stepwise`."""
        for part in adapter.settings.members:
            if isinstance(part.method, Stepwise):
                part.method.begin(view(adapter, part), steps)

    def after_step(self, adapter: Adapter) -> None:
        """See `Stepwise`."""
        for part in adapter.settings.members:
            if isinstance(part.method, Stepwise):
                part.method.after_step(view(adapter, part))


def view(adapter: Adapter, part: Part) -> Adapter:
    """One part of a mixed adapter as an adapter of its own, over the same deltas."""
    chains = {place: chain.deltas for place, chain in adapter.deltas.items() if isinstance(chain, Chain)}
    deltas = {place: found[part.name] for place, found in chains.items() if part.name in found}
    base = adapter.base if part.trains_base else {}
    return Adapter(adapter.name, part.method, part.settings, deltas, base, adapter.tied, adapter.steps)


_TOKENS = (
    ("virtual_tokens", "before every example"),
    ("visual_tokens", "before every example with an image"),
    ("infix_tokens", "before every answer"),
)


def _check_tokens(deltas: Mapping[str, Delta]) -> None:
    """Raise AdapterError where two parts put tokens into the row: each could not tell which are its own."""
    for attribute, what in _TOKENS:
        having = [name for name, delta in deltas.items() if getattr(delta, attribute)]
        if len(having) > 1:
            raise AdapterError(
                f"adapter.parts: {' and '.join(having)} both put tokens {what}, and neither could tell its own; keep "
                "one of them with as many tokens as both"
            )


METHOD = Mixed()
