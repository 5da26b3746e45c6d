"""GPTQ: quantize a weight column by column, each time moving the error onto the columns to come   (arXiv:2210.17323).

    minimise ||W X - Q X||^2:    H = X X^T + damp mean(diag H) I,    U = upper Cholesky factor of H^-1
    for each column i:  q_i = round(w_i / scale + zero);  e = (w_i - scale (q_i - zero)) / U_ii;  w_j -= e U_ij, j > i

Scale and zero are those of a row's group of columns, asymmetric, found when its first column comes. With act-order the
columns are taken by falling H_ii. X comes from running calibration text through the model, blocks before quantized.

Each column of X (a token) is divided by its length, which the paper does not do. The first token's inputs to some
down_proj are hundreds of times the others' and make up most of X X^T: without it, the weights are fitted to that one
token, and come out worse than rounded ones (docs/results/quant.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tunesmith.errors import ConfigError, ModelError
from tunesmith.model.layout import Layout
from tunesmith.model.linear import Linear
from tunesmith.model.llama import Block, Llama
from tunesmith.model.seam import Context
from tunesmith.quant.grouped import BITS, hold

BLOCK = 128  # columns whose errors are moved on together
_NAME = "calibration"
# Linears that get the same input: the Gram matrix of one serves the others.
_SHARES = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@dataclass(frozen=True)
class Gptq:
    """How to quantize: bits a number, columns of a group (none: the whole row), order by H_ii, share of damping.

    `equal_tokens`: every token of the calibration text counts the same, however large the inputs are that it makes.
    """

    bits: int = 4
    group_size: int | None = 128
    act_order: bool = False
    damp: float = 0.01
    equal_tokens: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(f"--bits: {self.bits} should be one of {', '.join(map(str, BITS))}")


class Gram(nn.Module):
    """Sits in the seam before a product and sums X^T X of what passes, unchanged; with `equal`, of rows of length 1."""

    def __init__(self, size: int, device: torch.device, equal: bool = True) -> None:
        super().__init__()
        self.equal = equal
        self.sum = torch.zeros(size, size, dtype=torch.float64, device=device)

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Any) -> Tensor:
        """(tokens, in) -> the same."""
        wide = value.detach().float()
        if self.equal:
            wide = functional.normalize(wide, dim=-1)
        self.sum += (wide.T @ wide).double()
        return value


@torch.no_grad()
def quantize_gptq(model: Llama, windows: Sequence[Sequence[int]], settings: Gptq) -> Llama:
    """Quantize the linears of the blocks in place, block by block, on the calibration `windows` of token ids.

    Raises ModelError where a group does not divide a weight's columns, ConfigError without windows.
    """
    if not windows:
        raise ConfigError("--text: too short for one window of calibration; give a longer text")
    contexts = [model.context(Layout.single(len(ids))) for ids in windows]
    states = [
        model.embedded(torch.tensor(ids, device=model.device), ctx) for ids, ctx in zip(windows, contexts, strict=True)
    ]
    for index, block in enumerate(model.model.layers):
        if not isinstance(block, Block):
            raise ModelError(f"model.layers.{index} is no block")
        grams = _grams(block, states, contexts, settings.equal_tokens)
        for name, linear in _linears(block):
            gram = grams[_SHARES.get(name, name)]
            linear.hold(*quantize_columns(linear.weight.float(), gram, settings, f"model.layers.{index}.{name}"))
        states = [block(h, ctx) for h, ctx in zip(states, contexts, strict=True)]
    return model


def _linears(block: Block) -> list[tuple[str, Linear]]:
    found = [(path.rpartition(".")[2], module) for path, module in block.named_modules()]
    return [(name, module) for name, module in found if isinstance(module, Linear)]


def _grams(block: Block, states: Sequence[Tensor], contexts: Sequence[Context], equal: bool) -> dict[str, Tensor]:
    """X X^T of the linears' inputs, by the name of the first linear that gets them."""
    recorders = {}
    for name, linear in _linears(block):
        if name not in _SHARES:
            recorders[name] = linear.input[_NAME] = Gram(linear.in_features, linear.weight.device, equal)
    try:
        for h, ctx in zip(states, contexts, strict=True):
            block(h, ctx)
    finally:
        for name, linear in _linears(block):
            if name not in _SHARES:
                del linear.input[_NAME]
    return {name: recorder.sum for name, recorder in recorders.items()}


def quantize_columns(weight: Tensor, gram: Tensor, settings: Gptq, name: str = "weight") -> Any:
    """(packed, storage) of a weight (rows, columns) for inputs whose X X^T is `gram`. Raises ModelError."""
    rows, columns = weight.shape
    size = settings.group_size or columns
    if columns % size or rows * columns % 8:
        raise ModelError(f"{name}: groups of {size} do not divide its {columns} columns; choose another --block-size")
    W, H = weight.double().clone(), gram.double().clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W[:, dead] = 0
    order = torch.arange(columns, device=W.device)
    if settings.act_order:
        order = torch.argsort(H.diagonal(), descending=True, stable=True)
        W, H = W[:, order], H[order][:, order]
    H.diagonal().add_(settings.damp * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    q, scales, zeros = _columns(W, U, settings.bits, size)
    back = torch.argsort(order)
    group = (back // size).int() if settings.act_order else None
    return hold(q[:, back], settings.bits, scales, zeros, group)


def _columns(W: Tensor, U: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers (rows, columns), scales and zeros (rows, groups), in the order of the columns; W is used up."""
    rows, columns = W.shape
    q = torch.empty_like(W)
    scales, zeros = W.new_empty(rows, columns // size), W.new_empty(rows, columns // size)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = W.new_zeros(rows, end - start)
        for i in range(start, end):
            group = i // size
            if i % size == 0:
                if end < i + size:  # the group goes on behind this block: its columns have to have moved
                    W[:, end : i + size] -= errors @ U[start:end, end : i + size]
                scales[:, group], zeros[:, group] = _range(W[:, i : i + size], bits)
                if end < i + size:
                    W[:, end : i + size] += errors @ U[start:end, end : i + size]
            scale, zero = scales[:, group], zeros[:, group]
            q[:, i] = (W[:, i] / scale).round().add_(zero).clamp_(0, 2**bits - 1)
            errors[:, i - start] = error = (W[:, i] - scale * (q[:, i] - zero)) / U[i, i]
            W[:, i:end] -= error[:, None] * U[i, i:end]
        W[:, end:] -= errors @ U[start:end, end:]
    return q, scales, zeros


def _range(weights: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero of each row, so that the numbers span its least and its largest weight, and 0."""
    most = 2**bits - 1
    low, high = weights.amin(1).clamp(max=0), weights.amax(1).clamp(min=0)
    flat = high == low
    scale = torch.where(flat, torch.ones_like(high), (high - low) / most).half().double()  # as it will be stored
    return scale, (-low / scale).round().clamp_(0, most)
