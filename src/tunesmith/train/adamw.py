"""AdamW (arXiv:1711.05101) by torch's fused kernel; with states in 8 bits or kept elsewhere, a slice at a time.

    m <- b1 m + (1 - b1) g;    v <- b2 v + (1 - b2) g^2
    p <- p - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + d p)

The kernel reads and writes each number once and needs no copies. torch's own optimizer classes would import its
compiler (two seconds) when they are made and stepped; these do not. In 8 bits (arXiv:2110.02861) they are
codes of the dynamic map, signed for m and unsigned for v, in blocks of 256 with an absmax each:

    bytes a parameter   8 with float32 states;   2 + 2 * 4 / 256 = 2.03 in 8 bits

Norms and other vectors, tensors of fewer than 4096 values and the token embedding keep float32 states, as there: little
is gained by less, and the embedding's gradients are too uneven for a common scale.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw

from tunesmith.quant.dynamic import BLOCK, decode, encode
from tunesmith.train.offload import Place

SMALL = 4096  # tensors of fewer values keep float32 states
WIDE_MODULES = frozenset({"embed_tokens"})
EIGHT_COPIES = 26  # bytes a value of a slice, in 8 bits, held at the most (tests/train/test_optim8.py)
SLICES = {"cpu": 1 << 18, "cuda": 1 << 22}  # values worked on at a time: what a cache holds; what keeps a GPU busy
_MOMENTS = (("exp_avg", True), ("exp_avg_sq", False))  # names, and whether they have a sign

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def in_eight_bits(name: str, parameter: Tensor) -> bool:
    """Are the states of this parameter 8-bit codes, with an 8-bit optimizer?"""
    return parameter.ndim > 1 and parameter.numel() >= SMALL and WIDE_MODULES.isdisjoint(name.split("."))


def state_layout(parameter: Tensor, eight: bool) -> Layout:
    """Names, shapes and dtypes of a parameter's states, in 8 bits or in its own dtype; the step apart."""
    shape = tuple(parameter.shape)
    if not eight:
        return {name: (shape, parameter.dtype) for name, _ in _MOMENTS}
    blocks = (-(-parameter.numel() // BLOCK),)
    layout: Layout = {}
    for name, _ in _MOMENTS:
        layout |= {name: (shape, torch.uint8), f"{name}_absmax": (blocks, torch.float32)}
    return layout


def layout_sizes(layout: Layout) -> Iterator[int]:
    """Bytes of each state."""
    return (math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())


def slice_bytes(largest: int, eight: bool, elsewhere: bool, device: str) -> int:
    """The most bytes that the work on one slice holds, of parameters of at most `largest` float32 values.

    m and v where they come from another device; in 8 bits m, v and what finding their codes takes.
    """
    wide = 8 if elsewhere and device != "cpu" else 0
    return min(SLICES.get(device, SLICES["cpu"]), largest) * (EIGHT_COPIES if eight else wide)


class HoldsStates(torch.optim.Optimizer, ABC):
    """An optimizer that says itself what its states are: those of a checkpoint have these names and shapes."""

    @abstractmethod
    def states(self) -> Mapping[Tensor, Mapping[str, Tensor]]:
        """Of each parameter that has been updated: its states and the number of its `step`s."""

    @abstractmethod
    def layout(self, parameter: Parameter) -> Layout:
        """What `states` holds, or would hold, of a parameter."""

    @abstractmethod
    def put(self, states: Mapping[Parameter, Mapping[str, Tensor]]) -> None:
        """Go on from these, as `states` gave them, on any device."""


class FusedAdamW(HoldsStates):
    """AdamW over groups with `params` and their `names`; states beside their parameters, in their dtype."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take a group as it is."""
        self.param_groups.append({**self.defaults, **param_group})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or make them zeros."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.detach_().zero_()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self._state(parameter) for parameter in moved]
            gradients = [_laid_out_as(parameter, parameter.grad) for parameter in moved]
            first, second, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
            update(moved, gradients, first, second, steps, group)

    def states(self) -> Mapping[Tensor, Mapping[str, Tensor]]:
        """See `HoldsStates`."""
        return self.state

    def layout(self, parameter: Parameter) -> Layout:
        """See `HoldsStates`."""
        return {**state_layout(parameter, False), "step": ((), torch.float32)}

    def put(self, states: Mapping[Parameter, Mapping[str, Tensor]]) -> None:
        """See `HoldsStates`."""
        for entries in self.state.values():
            for value in entries.values():
                value.zero_()
        for parameter, saved in states.items():
            own = self._state(parameter)
            for name, value in saved.items():
                own[name].copy_(value)

    def _state(self, parameter: Parameter) -> dict[str, Tensor]:
        """A parameter's states, zeros at first."""
        own: dict[str, Tensor] = self.state[parameter]
        if not own:
            for name, _ in _MOMENTS:
                own[name] = torch.zeros_like(parameter)
            own["step"] = torch.zeros((), device=parameter.device)
        return own


class SlicedAdamW(FusedAdamW):
    """The same a slice of a parameter at a time; `eight`: states in 8 bits; `place`: where they lie."""

    def __init__(self, groups: list[dict[str, Any]], *, place: Place, eight: bool = False, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.place = place
        self._eight = {
            parameter: eight and in_eight_bits(name, parameter)
            for group in self.param_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
        }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        devices = set()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
                    devices.add(parameter.device)
        for device in devices:
            self.place.settle(device)

    def layout(self, parameter: Parameter) -> Layout:
        """See `HoldsStates`."""
        return {**state_layout(parameter, self._eight[parameter]), "step": ((), torch.float32)}

    def _state(self, parameter: Parameter) -> dict[str, Tensor]:
        own: dict[str, Tensor] = self.state[parameter]
        if not own:
            for name, (shape, dtype) in state_layout(parameter, self._eight[parameter]).items():
                own[name] = self.place.zeros(shape, dtype, parameter.device)
            own["step"] = torch.zeros(())
        return own

    def _update(self, parameter: Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        state, eight = self._state(parameter), self._eight[parameter]
        values, grad = parameter.detach().reshape(-1), grad.reshape(-1)
        size = SLICES.get(parameter.device.type, SLICES["cpu"])
        for start in range(0, len(values), size):
            part = slice(start, min(start + size, len(values)))
            moments = self._eight_bit(state, part, values) if eight else self._wide(state, part, values)
            count = state["step"].to(values.device, copy=True)  # counted up by each call
            update([values[part]], [grad[part]], [moments[0]], [moments[1]], [count], group)
            self._keep(state, part, moments, eight)
        state["step"] += 1
        if not parameter.is_contiguous():  # then `values` are a copy
            parameter.copy_(values.view(parameter.shape))

    def _wide(self, state: dict[str, Tensor], part: slice, values: Tensor) -> list[Tensor]:
        return [self.place.fetch(state[name].view(-1)[part], values.device) for name, _ in _MOMENTS]

    def _eight_bit(self, state: dict[str, Tensor], part: slice, values: Tensor) -> list[Tensor]:
        found = []
        for name, signed in _MOMENTS:
            codes = self.place.fetch(state[name].view(-1)[part], values.device)
            absmax = self.place.fetch(state[f"{name}_absmax"][_blocks(part)], values.device)
            found.append(decode(codes, absmax, signed).to(values.dtype))
        return found

    def _keep(self, state: dict[str, Tensor], part: slice, moments: list[Tensor], eight: bool) -> None:
        for (name, signed), moment in zip(_MOMENTS, moments, strict=True):
            own = state[name].view(-1)[part]
            if not eight:
                self.place.store(own, moment)
                continue
            codes, absmax = encode(moment.float(), signed)
            self.place.store(own, codes)
            self.place.store(state[f"{name}_absmax"][_blocks(part)], absmax)


def update(
    values: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    group: Mapping[str, Any],
) -> None:
    """One step in place, of tensors that lie alike, by the settings of `group`; each of `steps` is counted up."""
    if not values:
        return
    adamw(
        values,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the parameter's order in memory, which is the kernel's."""
    same = gradient.stride() == parameter.stride()
    return gradient if same else torch.empty_like(parameter).copy_(gradient)


def _blocks(part: slice) -> slice:
    """The blocks of a slice that begins with one."""
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))
