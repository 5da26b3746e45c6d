"""BitFit: biases alone are trained   (arXiv:2106.10199).

    W x  ->  W x + b,    b = 0 at the start

LLaMA has no biases, so this *adds* them: to the linears (42,496 values a layer of LLaMA-7B), and with `norms: true` to
the norms as well. Where a base has biases of its own (Qwen2), what is trained here is their change, which is the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tunesmith.adapters.base import Delta, Placement
from tunesmith.adapters.targets import select_linears
from tunesmith.config import STRICT
from tunesmith.config.sections import Words
from tunesmith.errors import CannotMerge
from tunesmith.model.linear import Linear
from tunesmith.model.llama import Llama, RMSNorm
from tunesmith.model.seam import Context


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BitFitSettings:
    """Settings under `adapter:` for `kind: bitfit`."""

    target_modules: str | Words = Field(
        default="all-linear", description="Module names, a regular expression, or all-linear (every one but lm_head)."
    )
    norms: bool = Field(default=False, description="Give every norm a bias too; it can then not be merged.")


class BiasDelta(Delta):
    """value + b on one Linear or RMSNorm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        return value + self.bias.to(value.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W stays; b is added to the Linear's bias. Raises CannotMerge on a norm."""
        if weight.ndim == 1:
            raise CannotMerge("a norm of this family has no bias to fold into: keep the adapter beside its base")
        wide = torch.promote_types(weight.dtype, self.bias.dtype)
        own = self.bias.detach().to(wide)
        return weight.to(wide), own if bias is None else bias.to(wide) + own


class BitFit:
    """The method of `kind: bitfit`."""

    kind = "bitfit"
    settings = BitFitSettings
    learning_rate = 1e-3

    def identity_at_init(self, settings: BitFitSettings) -> bool:
        """See `Method`."""
        return True

    def mergeable(self, settings: BitFitSettings) -> bool:
        """Only where linears alone carry them: a Linear may have a bias, an RMSNorm has none."""
        return not settings.norms

    def place(self, model: Llama, settings: BitFitSettings) -> Iterator[Placement]:
        """One bias on each target, and on each norm if asked for."""
        targets = dict(select_linears(model, settings.target_modules))
        for path, module in model.named_modules():
            if path in targets and isinstance(module, Linear):
                yield Placement(path, "edit", BiasDelta(module.out_features))
            elif settings.norms and isinstance(module, RMSNorm):
                yield Placement(path, "edit", BiasDelta(len(module.weight)))

    def unfreeze(self, model: Llama, settings: BitFitSettings) -> Iterator[str]:
        """Nothing of the base: its biases, if any, stay and are added to."""
        return iter(())

    def lr_scale(self, name: str, settings: BitFitSettings) -> float:
        """One rate for all."""
        return 1.0


METHOD = BitFit()
