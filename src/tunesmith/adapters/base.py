"""What an adaptation method is, and how one is attached to a model.

Method  one per file: which settings it takes, which deltas it places in which seams, which base parameters it trains
Delta   the small module that sits in a seam
Adapter one method attached to one model under a name: what to train and what to save
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from tunesmith.errors import AdapterError, CannotMerge
from tunesmith.model.llama import Llama
from tunesmith.model.seam import Context, Seam
from tunesmith.model.sight import Look

T = TypeVar("T")


class Delta(nn.Module):
    """Base of the modules that sit in a seam. Owns its parameters and buffers; no caches, no reference to its host.

    `adapter` is the name that it is attached under. `virtual_tokens`: how many tokens of its own it puts before every
    example (see `Context.virtual`); `infix_tokens`: how many right before every answer; `answer_ends`: of how many of
    a prompt's last tokens it must be told (see `Context.to_answer`); `looks`: which features of its example's image it
    must be given, `visual_tokens`: how many tokens it puts before examples that have one (see `Context.sight`). The
    latter five are for deltas in `model.embed`.
    `detached` names parameters whose gradient leaves out a part that the method holds constant.
    """

    adapter: str = ""
    virtual_tokens: int = 0
    infix_tokens: int = 0
    answer_ends: int = 0
    looks: tuple[Look, ...] = ()
    visual_tokens: int = 0
    detached: frozenset[str] = frozenset()

    def forward(self, value: Any, host: nn.Module, ctx: Context, given: Any) -> Any:
        """Return the edited value. `host` owns the seam; `given` is what else the seam knows."""
        raise NotImplementedError

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of a plain Linear that computes the same, in float32. Raises CannotMerge."""
        raise CannotMerge(f"{type(self).__name__} cannot be folded into a weight: keep the adapter beside its base")

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """A, B and s, where the edit of W x is W x + s B A x and nothing else, as things are now; else None."""
        return None

    def penalty(self) -> Tensor | None:
        """A scalar added to the loss, or None."""
        return None

    def after_step(self) -> None:
        """Called after every optimizer step."""


@dataclass(frozen=True)
class Placement:
    """Put `delta` into seam `seam` of the module at `path` (the model's own name for it)."""

    path: str
    seam: str
    delta: Delta


class Method(Protocol):
    """An adaptation method. A file in this folder makes one by setting `METHOD` to an object of this shape."""

    kind: str
    settings: type  # a strict pydantic dataclass: what the user may write under `adapter:`
    learning_rate: float  # the default that works

    def identity_at_init(self, settings: Any) -> bool:
        """Does attaching it leave the model's output exactly as it was?"""

    def mergeable(self, settings: Any) -> bool:
        """Do all of its deltas fold into plain weights?"""

    def place(self, model: Llama, settings: Any) -> Iterator[Placement]:
        """Yield the deltas to put into the model, freshly initialised, in float32."""

    def unfreeze(self, model: Llama, settings: Any) -> Iterator[str]:
        """Yield the names of base parameters that the method trains."""

    def lr_scale(self, name: str, settings: Any) -> float:
        """Factor on the learning rate of the parameter `name` (as in `Adapter.trainable`)."""


@runtime_checkable
class Exchangeable(Protocol):
    """A method that PEFT's file format can say exactly; the others are saved in a format of our own.

    Methods of one `peft_type` also have `reads(config) -> bool`: is a file with this adapter_config.json theirs?
    """

    peft_type: str  # as in adapter_config.json

    def to_peft(self, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the method's keys of adapter_config.json, and the tensors without the prefix `base_model.model.`.

        Raises CannotExchange, with the reason, where PEFT would compute something else: our own format holds it then.
        """

    def from_peft(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Llama, where: str
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return settings (for `attach`) and state (for `Adapter.load_state`) of such a file.

        Raises AdapterError, naming the key, for anything that is not understood or does not fit `model`; nothing is
        attached and nothing larger than the file is allocated before that.
        """


@runtime_checkable
class Worded(Protocol):
    """A method whose settings may hold a text, which it can use only as token ids."""

    def with_ids(self, settings: Any, encode: Callable[[str], Sequence[int]]) -> Any:
        """Return the settings with the ids of their text, without BOS. Raises AdapterError for a text without any."""


@runtime_checkable
class Stepwise(Protocol):
    """A method that acts on all of its deltas together while they are trained, as one that shares out ranks does."""

    def begin(self, adapter: Adapter, steps: int) -> None:
        """Called before a run of `steps` optimizer steps. Raises ConfigError for settings that do not fit them."""

    def after_step(self, adapter: Adapter) -> None:
        """Called after every optimizer step, gradients still there, when every delta has acted for itself."""


@dataclass
class Adapter:
    """A method attached to a model under a name.

    `deltas` maps "path.seam" to the delta there; `base` names the base parameters that are trained as well; `tied`: is
    the base's head its embedding? `steps` is how many the run makes, once it has begun.
    """

    name: str
    method: Method
    settings: Any
    deltas: dict[str, Delta] = field(default_factory=dict)
    base: dict[str, nn.Parameter] = field(default_factory=dict)
    tied: bool = False
    steps: int | None = None

    @property
    def kind(self) -> str:
        """The method's name."""
        return self.method.kind

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by a name that does not depend on the adapter's: "path.seam.PARAMETER"."""
        own = ((f"{place}.{key}", p) for place, delta in self.deltas.items() for key, p in delta.named_parameters())
        return {**_once(own), **self.base}

    def state(self) -> dict[str, Tensor]:
        """Everything that must be saved to have this adapter again: parameters and buffers, detached, not copied."""
        held = ((place, delta.state_dict(keep_vars=True)) for place, delta in self.deltas.items())
        own = _once((f"{place}.{key}", t) for place, tensors in held for key, t in tensors.items())
        return {key: t.detach() for key, t in {**own, **self.base}.items()}

    def load_state(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Copy `tensors` in. Raises AdapterError unless names and shapes are exactly those of `state`."""
        own = self.state()
        problems = [f"{key}: missing" for key in own if key not in tensors]
        problems += [f"{key}: unexpected" for key in tensors if key not in own]
        problems += [
            f"{key}: shape {tuple(tensors[key].shape)}, expected {tuple(own[key].shape)}"
            for key in own
            if key in tensors and own[key].shape != tensors[key].shape
        ]
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise AdapterError(f"{where}: does not fit this model: {'; '.join(problems[:5])}{more}")
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(tensors[key])

    def penalty(self) -> Tensor | None:
        """The sum of the deltas' penalties, or None where there is none."""
        found = [p for delta in self.deltas.values() if (p := delta.penalty()) is not None]
        return torch.stack(found).sum() if found else None

    def begin(self, steps: int) -> None:
        """Say how many optimizer steps are to come in all. Raises ConfigError for settings that do not fit them."""
        self.steps = steps
        if isinstance(self.method, Stepwise):
            self.method.begin(self, steps)

    def after_step(self) -> None:
        """Let every delta, and then the method, act after an optimizer step."""
        for delta in self.deltas.values():
            delta.after_step()
        if isinstance(self.method, Stepwise):
            self.method.after_step(self)


def _once(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Each of these by its first name: deltas may have a module in common."""
    first: dict[int, tuple[str, T]] = {}
    for name, value in named:
        first.setdefault(id(value), (name, value))
    return dict(first.values())


def weight_path(place: str) -> str:
    """The path of the module whose weight a delta at `place` ("path.seam") edits the product of."""
    path = place.rpartition(".")[0]
    return f"{path}.embed_tokens" if place == "model.embed" else path


def install(model: Llama, method: Method, settings: Any, name: str, seed: int) -> Adapter:
    """Attach `method` under `name`: place its deltas, unfreeze what it trains. An AdapterError changes nothing."""
    if not name.isidentifier() or hasattr(Seam, name):
        raise AdapterError(f"adapter name {name!r}: use letters, digits and _, and no word of Python's dictionaries")
    if any(name in module for module in model.modules() if isinstance(module, Seam)):
        raise AdapterError(f"adapter {name!r} is already attached: choose another name or detach it first")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        placements = list(method.place(model, settings))
    base = {key: model.get_parameter(key) for key in method.unfreeze(model, settings)}
    if held := [key for key, parameter in base.items() if not parameter.is_floating_point()]:
        raise AdapterError(
            f"{held[0]}: {method.kind} trains it, and it is quantized ({len(held)} weights are); set quant.kind=none, "
            "or choose a method that trains none of the base's linears"
        )
    if not placements and not base:
        raise AdapterError(f"adapter {name!r} ({method.kind}): its settings select nothing to train in this model")
    seams = {path: module for path, module in model.named_modules() if isinstance(module, Seam)}
    places = [f"{placement.path}.{placement.seam}" for placement in placements]
    for place in places:
        if place not in seams or places.count(place) > 1:
            fault = "is no seam" if place not in seams else "is given two deltas"
            raise AdapterError(f"{place} {fault}: method {method.kind} is written wrongly")
    adapter = Adapter(name, method, settings, tied=model.config.tie_word_embeddings)
    dtype = torch.promote_types(model.dtype, torch.float32)
    for place, placement in zip(places, placements, strict=True):
        delta = placement.delta.to(device=model.device, dtype=dtype).train(model.training)
        delta.adapter = name
        seams[place][name] = delta
        adapter.deltas[place] = delta
    for key, parameter in base.items():
        parameter.requires_grad_(True)
        adapter.base[key] = parameter
    return adapter


def uninstall(model: Llama, adapter: Adapter) -> None:
    """Take an adapter off. Raises AdapterError for one that trained base weights: those cannot be had back."""
    if adapter.base:
        raise AdapterError(f"adapter {adapter.name!r} ({adapter.kind}) changed base weights: load the base model again")
    for place in adapter.deltas:
        seam = model.get_submodule(place)
        if isinstance(seam, Seam):
            del seam[adapter.name]
    adapter.deltas.clear()
