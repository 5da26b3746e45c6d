"""Perplexity of a text, cut into windows of tokens:

    exp( sum of -log p(token | what stands before it in its window) / number of predicted tokens )

A window begins every `stride` tokens, by default where the one before it ended; of windows that overlap, each predicts
only what none before it did. Without BOS a window's first token has nothing before it and is not predicted.

| corpus   | a row is                                     | joined by |
|----------|----------------------------------------------|-----------|
| wikitext | a line with its end; a blank one is empty    | "\\n\\n"    |
| ptb      | a line                                       | "\\n\\n"    |
| c4       | a document                                   | " "       |
| text     | a whole file of text, or a row with keys     | "\\n\\n"    |

Rows of wikitext are those of the data set on the hub, so the joined text is the one that papers measure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from tunesmith.config import STRICT
from tunesmith.data.sources import READERS, raw_rows
from tunesmith.errors import ConfigError, DataError, did_you_mean
from tunesmith.evaluate.figures import Figure, Z
from tunesmith.evaluate.language_model import is_uniform, perplexity_of
from tunesmith.evaluate.subject import Subject
from tunesmith.evaluate.tasks import Result, Task
from tunesmith.inference.prefill import context_limit
from tunesmith.inference.score import Scored, score_pairs
from tunesmith.tokenizer import Tokenizer

WINDOW = 2048
TOKENIZED = re.compile(r"(?<!\S)(?:<unk>|@[-,.]@)(?!\S)")  # words that only a text cut into words and spaces has
FIELDS = ("text", "sentence", "page")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PerplexitySettings:
    """How a text is joined and cut."""

    window: int | None = Field(default=None, ge=2, description="Tokens of a window; none is 2048, or the context.")
    stride: int | None = Field(default=None, ge=1, description="Tokens from window to window; none: no overlap.")
    windows: int | None = Field(default=None, ge=1, description="Measure only the first windows.")
    bos: Literal["auto", "text", "windows", "none"] = Field(
        default="auto", description="Before the text, before every window, nowhere; auto: as the tokenizer does."
    )
    joiner: str | None = Field(default=None, description="What stands between rows; none is the corpus's own.")
    field: str | None = Field(default=None, description="Key of a row's text; none: text, sentence or page.")


Pair = tuple[list[int], list[int]]


def cut(ids: Sequence[int], window: int, stride: int | None = None, bos: int | None = None) -> Iterator[Pair]:
    """(what is read, what is predicted after it) of every window of `window` tokens; `bos` begins each, if given."""
    body = window - (bos is not None)
    begin = [] if bos is None else [bos]
    done = 0
    for start in range(0, len(ids), stride or body):
        end = min(start + body, len(ids))
        first = max(done, start + (bos is None))
        if end > first:
            yield [*begin, *ids[start:first]], list(ids[first:end])
        done = end
        if end == len(ids):
            return


def read(path: Path, settings: PerplexitySettings, row: Callable[[str], str] | None = None) -> list[str]:
    """The rows of a text file (`row` makes one of a line; absent: it is one row), or of one with keys.

    Raises DataError.
    """
    if not any(path.name.endswith(kind) for kind in READERS if not kind.startswith(".txt")):
        try:
            with path.open(encoding="utf-8-sig") as file:
                rows = [file.read()] if row is None else [row(line) for line in file]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}: cannot be read as UTF-8 text ({getattr(error, 'strerror', None) or error})"
            ) from None
    else:
        rows = [_text(raw, f"{path}:{line}", settings.field) for line, raw in raw_rows(path)]
    if not any(text.strip() for text in rows):
        raise DataError(f"{path}: holds no text; give it data or name another file")
    return rows


def measure(subject: Subject, rows: Sequence[str], settings: PerplexitySettings, joiner: str) -> Result:
    """`perplexity` and `loss` (nats a token) of the joined rows. Raises ConfigError, DataError."""
    joiner = joiner if settings.joiner is None else settings.joiner
    text = joiner.join(rows)
    window = _window(settings, context_limit(subject.model.config))
    bos = settings.bos if settings.bos != "auto" else "text" if subject.tokenizer.add_bos else "none"
    token = _bos_id(subject.tokenizer) if bos != "none" else None
    ids = [*([token] if bos == "text" and token is not None else []), *subject.tokenizer.encode(text)]
    pairs = list(cut(ids, window, settings.stride, token if bos == "windows" else None))[: settings.windows]
    if not pairs:
        raise DataError(f"perplexity: the text has {len(ids)} token, so there is nothing to predict; give a longer one")
    scored = score_pairs(
        subject.model, pairs, adapters=subject.adapters, share_prefix=False, pack_tokens=max(window, subject.budget)
    )
    figures = _figures(scored, [len(predicted) for _, predicted in pairs])
    vocab = subject.model.config.vocab_size
    uniform = is_uniform(figures["loss"].value, vocab)
    stated = {
        "window": window,
        "stride": settings.stride or window - (bos == "windows"),
        "bos": bos,
        "joiner": joiner,
        "text": "tokenized" if TOKENIZED.search(text) else "raw",
        "rows": len(rows),
        "tokens": len(ids),
        "windows": len(pairs),
        "predicted": figures["loss"].count,
        "uniform": uniform,
    }
    note = f"the perplexity is the vocabulary's size, {vocab}: uniform logits; were the base's weights loaded?"
    each = [-score.logprob / len(predicted) for score, (_, predicted) in zip(scored, pairs, strict=True)]
    return Result(figures, stated, {"loss": each}, notes=[note] if uniform else [])


def _figures(scored: Sequence[Scored], counts: Sequence[int]) -> dict[str, Figure]:
    """Loss and perplexity over all tokens; their interval is that of a ratio of sums over windows."""
    tokens, windows = sum(counts), len(counts)
    loss = -math.fsum(score.logprob for score in scored) / tokens
    interval = None
    if windows > 1:
        off = math.fsum((-score.logprob - loss * count) ** 2 for score, count in zip(scored, counts, strict=True))
        half = Z * math.sqrt(off * windows / (windows - 1)) / tokens
        interval = (loss - half, loss + half)
    perplexities = interval and (perplexity_of(interval[0]), perplexity_of(interval[1]))
    return {
        "perplexity": Figure(perplexity_of(loss), tokens, perplexities, False),
        "loss": Figure(loss, tokens, interval, False),
    }


def _window(settings: PerplexitySettings, limit: int | None) -> int:
    window = settings.window or (WINDOW if limit is None else min(WINDOW, limit))
    if limit is not None and window > limit:
        raise ConfigError(f"window={window}: exceeds the model's context of {limit}; lower it")
    body = window - (settings.bos == "windows")
    if settings.stride is not None and settings.stride > body:
        raise ConfigError(f"stride={settings.stride}: over the {body} tokens of a window it leaves some out; lower it")
    return window


def _bos_id(tokenizer: Tokenizer) -> int:
    if tokenizer.bos_id is None:
        raise ConfigError("bos: this model's tokenizer has no BOS token; set bos=none")
    return tokenizer.bos_id


def _text(raw: Any, where: str, field: str | None) -> str:
    if isinstance(raw, str):
        return raw
    keys = [str(key) for key in raw] if isinstance(raw, Mapping) else []
    name = field or next((key for key in FIELDS if key in keys), FIELDS[0])
    text = raw.get(name) if isinstance(raw, Mapping) else None
    if not isinstance(text, str):
        hint = did_you_mean(name, keys)
        raise DataError(f"{where}: has no text under {name!r} (keys here: {', '.join(keys[:8]) or 'none'}){hint}")
    return text


def _corpus(name: str, about: str, row: Callable[[str], str] | None, joiner: str) -> Task:
    return Task(name, about, PerplexitySettings, partial(read, row=row), partial(measure, joiner=joiner))


CORPORA = (
    _corpus("text", "perplexity of any text", None, "\n\n"),
    _corpus("wikitext", "perplexity of WikiText", lambda line: line if line.strip() else "", "\n\n"),
    _corpus("ptb", "perplexity of the Penn Treebank", str.strip, "\n\n"),
    _corpus("c4", "perplexity of C4", str.strip, " "),
)
