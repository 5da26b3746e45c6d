"""What is measured: a model with its adapters, and held-out rows in both their forms."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.data.encode import Example
from tunesmith.data.schemas import Row
from tunesmith.data.segments import Template
from tunesmith.model.llama import Llama
from tunesmith.tokenizer import Tokenizer


@dataclass(frozen=True)
class Subject:
    """`examples` are the encoded `rows`; `labels` the classes of a classification (empty: none).

    A task (evaluate/tasks.py) brings its own items: it is given a subject without rows.

    `adapters`: the attached ones that act (None: all, (): the bare base). `budget`: tokens of a pack.
    """

    model: Llama
    tokenizer: Tokenizer
    template: Template
    rows: tuple[Row, ...] = ()
    examples: tuple[Example, ...] = ()
    labels: tuple[str, ...] = ()
    adapters: tuple[str, ...] | None = None
    budget: int = 4096
