"""The one Linear of the model: a frozen product with a seam before and after it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tunesmith.model.seam import Context, Seam


class Linear(nn.Module):
    """y = edit(W input(x)) + b, for x of shape (tokens, in_features).

    Seams: `input` edits x before the product; `edit` edits W x before the bias and is given x.
    Without adapters this is `torch.nn.Linear`, and the parameters have its names.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.input, self.edit = Seam(), Seam()

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """(tokens, in_features) -> (tokens, out_features)."""
        if len(self.input):
            x = self.input(x, self, ctx)
        if not len(self.edit):
            return functional.linear(x, self.weight, self.bias)
        y = self.edit(functional.linear(x, self.weight), self, ctx, x)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Sizes, as torch.nn.Linear prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
