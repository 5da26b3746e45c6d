"""Parameters that an optimizer moves by made-up gradients, the same every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tunesmith.train.checkpoint import load_checkpoint, pack_optimizer, save_checkpoint, unpack_optimizer
from tunesmith.train.optim import build_optimizer, set_learning_rate


class Moves:
    """Parameters of the kinds that a run has, and an optimizer over them."""

    def __init__(self, dtype: torch.dtype = torch.float32, spread: float = 4.0, **settings: Any) -> None:
        draw = torch.Generator().manual_seed(0)
        made = {
            "model.embed_tokens.weight": torch.randn(90, 61, generator=draw),
            "model.layers.0.mlp.up_proj.weight": torch.randn(131, 93, generator=draw),
            "model.layers.0.mlp.down_proj.weight": torch.randn(57, 120, generator=draw).t(),  # not contiguous
            "model.layers.0.input_layernorm.weight": torch.randn(5000, generator=draw),
            "model.layers.0.self_attn.q_proj.lora_A": torch.randn(3, 50, generator=draw),
            "unused": torch.randn(70, 70, generator=draw),
        }
        self.parameters = {name: Parameter(value.to(dtype)) for name, value in made.items()}
        self.names = {parameter: name for name, parameter in self.parameters.items()}
        settings = {"learning_rate": 1e-2, "weight_decay": 0.1, **settings}
        self.optimizer = build_optimizer(self.parameters, **settings)
        self.steps, self.spread = 0, spread

    def gradients(self) -> None:
        """Those of the next step, over `spread` orders of magnitude; `unused` has none."""
        draw = torch.Generator().manual_seed(100 + self.steps)
        for name, p in self.parameters.items():
            size = 10 ** (self.spread * (torch.rand(p.shape, generator=draw) - 1))
            p.grad = None if name == "unused" else (torch.randn(p.shape, generator=draw) * size).to(p.dtype)

    def go(self, steps: int) -> Moves:
        """Make so many steps, at a rate that falls."""
        for _ in range(steps):
            self.gradients()
            set_learning_rate(self.optimizer, 1e-2 / (1 + self.steps))
            self.optimizer.step()
            self.steps += 1
        return self

    def values(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def states(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in pack_optimizer(self.optimizer, self.names).items()}

    def save(self, folder: Path) -> Path:
        """A checkpoint of it."""
        packed = pack_optimizer(self.optimizer, self.names)
        tensors = {"adapter": self.values(), "optimizer": packed}
        return save_checkpoint(folder, self.steps, tensors=tensors, state={"steps": self.steps})

    def load(self, checkpoint: Path) -> Moves:
        """Go on from a checkpoint."""
        tensors, state = load_checkpoint(checkpoint)
        for name, value in tensors["adapter"].items():
            self.parameters[name].data.copy_(value)
        unpack_optimizer(self.optimizer, self.names, tensors["optimizer"])
        self.steps = state["steps"]
        return self


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
