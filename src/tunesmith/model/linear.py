"""The one Linear of the model: a frozen product with a seam before and after it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tunesmith.model.adapted import LowRank, adapted_product
from tunesmith.model.matmul import linear
from tunesmith.model.product import dense, product
from tunesmith.model.seam import Context, Seam
from tunesmith.quant.storage import Storage


class Linear(nn.Module):
    """y = edit(W input(x)) + b, for x of shape (tokens, in_features).

    Seams: `input` edits x before the product; `edit` edits W x before the bias and is given x.
    Without adapters this is `torch.nn.Linear`, and the parameters have its names.

    Where `quant` is there, `weight` holds W's packed numbers (see quant/storage.py) and `dense_weight` gives W.
    """

    quant: Storage | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.input, self.edit = Seam(), Seam()
        self.register_module("quant", None)
        self.wide = torch.float32

    @property
    def bare(self) -> bool:
        """Is y only W x: no seam is filled, and there is no bias?"""
        return not (len(self.input) or len(self.edit) or self.bias is not None)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """(tokens, in_features) -> (tokens, out_features)."""
        if len(self.input):
            x = self.input(x, self, ctx)
        if self.quant is None and not len(self.edit):
            return self._product(x, ctx, self.bias)
        update = self._update(ctx) if len(self.edit) else None
        if update is not None:
            y = adapted_product(x, self.weight, self.quant, update, ctx.kept)
            return y if self.bias is None else y + self.bias
        y = self._product(x, ctx)
        if len(self.edit):
            y = self.edit(y, self, ctx, x)
        return y if self.bias is None else y + self.bias

    def _update(self, ctx: Context) -> LowRank | None:
        """A, B and s of a low-rank update that is trained with W frozen; None where the general way is needed."""
        if not torch.is_grad_enabled() or self.weight.requires_grad:
            return None
        return self.edit.low_rank(ctx)

    def _product(self, x: Tensor, ctx: Context, bias: Tensor | None = None) -> Tensor:
        if ctx.kept is not None:
            return ctx.kept.product(x, self.weight, bias, self.quant)
        return linear(x, self.weight, bias) if self.quant is None else product(x, self.weight, self.quant)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W, (out_features, in_features): the Parameter itself, or made anew from a quantized one."""
        if self.quant is None:
            return self.weight if dtype is None else self.weight.to(dtype)
        return dense(self.weight, self.quant, dtype or self.wide)

    def hold(self, packed: Tensor, storage: Storage, wide: torch.dtype = torch.float32) -> None:
        """Keep W in `packed` from here on, frozen, read by `storage`; `wide` is what `dense_weight` gives unasked."""
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.quant, self.wide = storage, wide

    def extra_repr(self) -> str:
        """Sizes, as torch.nn.Linear prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
