"""A logistic regression on an encoder's global features: python -m bench.children.seeing_regression SPEC.json

The features are those that LLaMA-Adapter with images gets, each column standardised by the training rows. Its penalty
is chosen among a few on a fifth of the training rows; then it is fitted again on all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.children.common import spec, tell
from tunesmith.adapters.llama_adapter_image import LlamaAdapterImageSettings
from tunesmith.data.sources import read_splits
from tunesmith.evaluate.classification import half_interval
from tunesmith.hardware import describe
from tunesmith.vision.open import look_all, open_rows

PENALTIES = (0.1, 1.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


def fit(x: Tensor, y: Tensor, classes: int, penalty: float) -> Tensor:
    """Weights (classes, columns + 1) that minimise the mean cross-entropy + penalty / 2 |W|^2 / columns."""
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(x @ weight.T, y) + penalty / 2 * weight[:, :-1].square().sum() / x.shape[1]
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def accuracy(weight: Tensor, x: Tensor, y: Tensor) -> float:
    """The share of rows whose likeliest class is theirs."""
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    return float(((x @ weight.T).argmax(1) == y).double().mean())


def main() -> None:
    """Fit, and tell the accuracy on the rows that were held out."""
    asked = spec()
    splits = read_splits(Path(asked["images"]))
    look = LlamaAdapterImageSettings(encoder=asked["encoder"]).looks[0]
    labels = sorted({row.label for row in splits.train if row.label})
    sets = []
    for rows in (open_rows(splits.train), open_rows(splits.valid)):
        pictures = [row.image for row in rows]
        look_all(pictures, [look])
        x = torch.stack([picture.look(look) for picture in pictures]).double()
        sets.append((x, torch.tensor([labels.index(row.label) for row in rows])))
    (x, y), (held_x, held_y) = sets
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6)
    x, held_x = (x - mean) / deviation, (held_x - mean) / deviation
    # At random: rows stand in turns by class.
    mine = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)) % 5 != 0
    tried = {p: accuracy(fit(x[mine], y[mine], len(labels), p), x[~mine], y[~mine]) for p in PENALTIES}
    penalty = max(tried, key=lambda p: tried[p])
    share = accuracy(fit(x, y, len(labels), penalty), held_x, held_y)
    tell(
        "regression",
        accuracy=share,
        accuracy_interval=half_interval(share, len(held_y)),
        penalty=penalty,
        columns=x.shape[1],
        classes=len(labels),
        train=len(y),
        valid=len(held_y),
        about=_about(),
    )


def _about() -> dict[str, Any]:
    about = describe()
    versions = {"tunesmith": about["tunesmith"], "commit": about["revision"], "torch": torch.__version__}
    return {"cpu": about["cpu"], "memory": about["memory"], "system": about["system"], "versions": versions}


if __name__ == "__main__":
    main()
