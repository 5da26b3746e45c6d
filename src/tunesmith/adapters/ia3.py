"""IA3: learned factors on keys, values and the MLP's inner activations   (arXiv:2205.05638).

    y <- l * (W x + b)     on k_proj and v_proj             l = 1 at the start
    y <- W (l * x) + b     on down_proj: what PEFT calls a feedforward module

It trains 2 kv_dim + intermediate_size values a layer: 614,400 of LLaMA-7B.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tunesmith.adapters import peft_config as peft
from tunesmith.adapters.base import Adapter, Delta, Placement
from tunesmith.adapters.lora_peft import drop_copies
from tunesmith.adapters.peft_targets import known_names, short_names
from tunesmith.adapters.targets import matching, select_linears
from tunesmith.config import STRICT
from tunesmith.config.sections import Words
from tunesmith.model.linear import Linear
from tunesmith.model.llama import Llama
from tunesmith.model.seam import Context

FEEDFORWARD = "down_proj"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class IA3Settings:
    """Settings under `adapter:` for `kind: ia3`."""

    target_modules: str | Words = Field(
        default=("k_proj", "v_proj", "down_proj"), description="Module names, a regular expression, or all-linear."
    )
    feedforward_modules: str | Words | None = Field(
        default=None, description="Those of them that are scaled at their input; none is down_proj, if it is one."
    )


class OutputScale(Delta):
    """l * (value + b) - b on one Linear, whose own bias b is added after the seam."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, value: Tensor, host: Any, ctx: Context, given: Tensor) -> Tensor:
        """(tokens, out) -> (tokens, out)."""
        whole = value if host.bias is None else value + host.bias
        # Not value * l: rounded to bfloat16, l = 1 + e loses a small e. And exactly value where l is 1.
        return torch.addcmul(value, whole, (self.scale - 1).to(value.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """diag(l) W and l * b."""
        wide = torch.promote_types(weight.dtype, self.scale.dtype)
        scale = self.scale.detach().to(wide)
        return scale[:, None] * weight.to(wide), None if bias is None else scale * bias.to(wide)


class InputScale(Delta):
    """l * x on the input of one Linear."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: None) -> Tensor:
        """(tokens, in) -> (tokens, in)."""
        return torch.addcmul(value, value, (self.scale - 1).to(value.dtype))  # as in OutputScale

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W diag(l); the bias stays."""
        wide = torch.promote_types(weight.dtype, self.scale.dtype)
        return weight.to(wide) * self.scale.detach().to(wide), bias


class IA3:
    """The method of `kind: ia3`."""

    kind = "ia3"
    settings = IA3Settings
    learning_rate = 1e-2
    peft_type = "IA3"

    def identity_at_init(self, settings: IA3Settings) -> bool:
        """See `Method`."""
        return True

    def mergeable(self, settings: IA3Settings) -> bool:
        """See `Method`."""
        return True

    def place(self, model: Llama, settings: IA3Settings) -> Iterator[Placement]:
        """One delta on each target. Raises AdapterError for a feedforward module that is no target."""
        targets = dict(select_linears(model, settings.target_modules))
        inner = _feedforward(settings, targets)
        for path, linear in targets.items():
            if path in inner:
                yield Placement(path, "input", InputScale(linear.in_features))
            else:
                yield Placement(path, "edit", OutputScale(linear.out_features))

    def unfreeze(self, model: Llama, settings: IA3Settings) -> Iterator[str]:
        """Nothing of the base."""
        return iter(())

    def lr_scale(self, name: str, settings: IA3Settings) -> float:
        """One rate for all."""
        return 1.0

    def to_peft(self, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Exchangeable`."""
        tensors = {}
        seams = dict(place.rsplit(".", 1) for place in adapter.deltas)
        for path, seam in seams.items():
            scale = adapter.trainable[f"{path}.{seam}.scale"]
            tensors[f"{path}.ia3_l"] = scale[None] if seam == "input" else scale[:, None]
        inner = [path for path, seam in seams.items() if seam == "input"]
        targets, feedforward = _peft_names(adapter.settings, list(seams), set(inner))
        return {
            "target_modules": targets,
            "feedforward_modules": feedforward,
            "exclude_modules": None,
            "fan_in_fan_out": False,
            "modules_to_save": None,
            "init_ia3_weights": True,
        }, tensors

    def from_peft(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Llama, where: str
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Exchangeable`."""
        peft.check_keys(config, ("target_modules", "feedforward_modules"), ("init_ia3_weights",), where)
        names = peft.names(config, "target_modules", where)
        if isinstance(names, list):
            names = known_names(names, [path for path, m in model.named_modules() if isinstance(m, Linear)], where)
        targets = dict(select_linears(model, names, where=where))
        inner = _peft_feedforward(config, targets, where)
        found = peft.plain_keys(tensors, where)
        drop_copies(found, model)
        shapes = {
            path: (1, linear.in_features) if path in inner else (linear.out_features, 1)
            for path, linear in targets.items()
        }
        peft.check_tensors({f"{path}.ia3_l": shape for path, shape in shapes.items()}, found, where)
        seams = {path: "input" if path in inner else "edit" for path in targets}
        return (
            {"target_modules": names, "feedforward_modules": short_names(inner, targets) or sorted(inner)},
            {f"{path}.{seam}.scale": found[f"{path}.ia3_l"][1].flatten() for path, seam in seams.items()},
        )


def _feedforward(settings: IA3Settings, targets: Collection[str]) -> set[str]:
    """The targets that are scaled at their input. Raises AdapterError for an entry that is none of them."""
    if settings.feedforward_modules is None:
        return {path for path in targets if path.endswith(f".{FEEDFORWARD}")}
    return matching(settings.feedforward_modules, list(targets), key="feedforward_modules", among="the targets are")


def _peft_feedforward(config: Mapping[str, Any], targets: Collection[str], where: str) -> set[str]:
    """The targets that PEFT takes for feedforward modules: a list's entries end a path, at a dot or not."""
    if config.get("feedforward_modules") == []:
        return set()
    names = peft.names(config, "feedforward_modules", where)
    if isinstance(names, str):
        return {path for path in targets if re.fullmatch(names, path)}
    return {path for path in targets if path.endswith(tuple(names))}


def _peft_names(settings: IA3Settings, paths: list[str], inner: set[str]) -> tuple[list[str], list[str]]:
    """target_modules and feedforward_modules that say the same in PEFT, which wants the second to be some of the first.

    A regular expression is spelled out: PEFT would try it on modules that are no Linear.
    """
    feedforward = short_names(inner, paths)
    if settings.target_modules == "all-linear":
        targets = sorted({path.rpartition(".")[2] for path in paths})
    else:
        targets = paths if isinstance(settings.target_modules, str) else list(settings.target_modules)
    if feedforward is None or not set(feedforward) <= set(targets):
        return sorted(paths), sorted(inner)
    return sorted(targets), feedforward


METHOD = IA3()
