"""The prompts' pass: all of them end to end in one row, common beginnings computed once, logits at last tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.encode import Example, picture_of
from tunesmith.data.pack import NOTHING, Node, answer_ends, prefix_tree, told_apart, with_infix
from tunesmith.errors import AdapterError, GenerationError, did_you_mean
from tunesmith.model.cache import Cache
from tunesmith.model.config import ModelConfig
from tunesmith.model.layout import Layout
from tunesmith.model.llama import Llama
from tunesmith.model.seam import Seam
from tunesmith.model.virtual import Names, Needs


def context_limit(config: ModelConfig) -> int | None:
    """The most tokens that a sequence may have; None where every layer has a sliding window and none is too far."""
    windowed = config.sliding_window is not None and len(config.window_layers) == config.num_hidden_layers
    return None if windowed else config.max_position_embeddings


def check_prompt(config: ModelConfig, prompt: Sequence[int], name: str, room: int = 1) -> None:
    """Raise GenerationError where a prompt is empty, not of the vocabulary, or leaves no `room` for further tokens."""
    limit = context_limit(config)
    if not len(prompt):
        raise GenerationError(f"{name}: holds no token; give it a text, or the tokenizer's BOS token")
    if limit is not None and len(prompt) > limit - room:
        raise GenerationError(
            f"{name}: {len(prompt)} tokens leave no room in the model's context of {limit} "
            "(max_position_embeddings); shorten it"
        )
    if min(prompt) < 0 or max(prompt) >= config.vocab_size:
        raise GenerationError(
            f"{name}: token {max(prompt) if min(prompt) >= 0 else min(prompt)} is outside of the model's vocabulary of "
            f"{config.vocab_size}; use the tokenizer that belongs to this model"
        )


def attached_adapters(model: Llama) -> list[str]:
    """Names of the adapters that edit something in this model, those that a bank holds included, sorted."""
    held = {name: getattr(delta, "members", None) for name, delta in model.model.embed.items()}
    banks = {name: list(members) for name, members in held.items() if members is not None}
    seams = {name for module in model.modules() if isinstance(module, Seam) for name in module}
    return sorted((seams - set(banks)).union(*banks.values()))


def check_adapters(model: Llama, adapters: tuple[str, ...] | None) -> None:
    """Raise AdapterError for a name that is attached nowhere: it would silently change nothing."""
    if not adapters:
        return
    attached = attached_adapters(model)
    for name in adapters:
        if name not in attached:
            known = ", ".join(attached) or "none"
            raise AdapterError(f"adapter {name!r} is not attached{did_you_mean(name, attached)} (attached: {known})")


def forward_last(
    model: Llama,
    tokens: Sequence[int] | Tensor,
    layout: Layout,
    cache: Cache,
    adapters: Sequence[Names | None],
    rows: Sequence[int],
) -> Tensor:
    """One pass with the cache; float32 logits (len(rows), vocab) at these rows.

    `adapters`: those that act on each segment; None, for every segment: all attached.
    """
    ids = torch.as_tensor(tokens, dtype=torch.int64, device=model.device)
    if all(names == adapters[0] for names in adapters):  # nothing to take apart
        ctx = model.context(layout, cache, adapters[0])
    else:
        ctx = model.context(layout, cache, routes=[names for names in adapters if names is not None])
    hidden = model.run(ids, ctx)
    if len(rows) != len(hidden):
        at = torch.as_tensor(rows, device=hidden.device)
        hidden, ctx = hidden[at], ctx.at(at)
    return model.logits(hidden, ctx).float()


def prefill(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    room: int,
    adapters: Sequence[Names | None],
    share_prefix: bool = True,
) -> tuple[Cache, Tensor]:
    """A cache of the prompts with room for `room` more tokens each, and the logits after each prompt, (prompts, vocab).

    `adapters`: those that act on each prompt; None, for every prompt: all attached. What several prompts with the same
    adapters begin with is computed once.
    """
    kinds = list(dict.fromkeys(adapters))
    groups = [kinds.index(names) for names in adapters]
    needs = [model.needs(names) for names in kinds]
    tokens, layout = pack_prompts(prompts, share_prefix, model.device, needs, groups)
    cache = Cache(model.config, len(prompts), max(map(len, prompts)) + room, model.dtype, model.device)
    ends = [start + length - 1 for start, length in zip(layout.starts, layout.lengths, strict=True)]
    acting = [kinds[0]] * (len(ends) - len(prompts)) + list(adapters)
    for segment in reversed(range(len(acting))):  # what prompts share is computed with the adapters that they share
        if (parent := layout.parents[segment]) >= 0:
            acting[parent] = acting[segment]
    return cache, forward_last(
        model, torch.from_numpy(tokens).to(model.device), layout, cache, acting, ends[-len(prompts) :]
    )


def pack_prompts(
    prompts: Sequence[Sequence[int]],
    share_prefix: bool,
    device: torch.device | str = "cpu",
    needs: Sequence[Needs] = (NOTHING,),
    groups: Sequence[int] | None = None,
) -> tuple[np.ndarray, Layout]:
    """Tokens and layout of a row: what prompts share, then each prompt's own end, in order.

    Every prompt keeps at least its last token to itself, whatever it shares: its logits are read there, and its keys
    and values become a sequence of the cache. `groups` numbers the prompts by the adapters that act on them (absent:
    all alike): only those of one group share. `needs`: what each group's adapters must find there (`Llama.needs`).
    """
    groups = [0] * len(prompts) if groups is None else groups
    ids = [with_infix(_example(p), needs[g].infix).ids.astype(np.int64) for p, g in zip(prompts, groups, strict=True)]
    marks = [answer_ends(_example(prompt), needs[g].ends) for prompt, g in zip(ids, groups, strict=True)]
    begins, parent_of = [0] * len(ids), [-1] * len(ids)
    shared: list[tuple[int, int, int]] = []  # prompt, from, to
    parents: list[int] = []
    number: dict[int, int] = {}
    keys = [(prompt + (mark << 32))[:-1] for prompt, mark in zip(ids, marks, strict=True)]  # as in data/pack.py
    pictures = [picture_of(prompt) if needs[g].looks else None for prompt, g in zip(prompts, groups, strict=True)]
    keys = told_apart(keys, pictures) if any(picture is not None for picture in pictures) else keys
    nodes = _common_beginnings(keys, groups) if share_prefix and len(ids) > 1 else []
    for i, node in enumerate(nodes):
        if len(node.members) == 1:
            continue  # a prompt's own end: laid out below, with its last token
        number[i] = len(shared)
        shared.append((node.members[0], node.start, node.stop))
        parents.append(number.get(node.parent, -1))
        for member in node.members:
            begins[member], parent_of[member] = node.stop, number[i]
    cuts = [*shared, *((i, begin, len(ids[i])) for i, begin in enumerate(begins))]
    told = np.concatenate([marks[i][a:b] for i, a, b in cuts]) if any(each.ends for each in needs) else None
    shown = [pictures[i] for i, _, _ in cuts]
    layout = Layout.of([stop - start for _, start, stop in cuts], [*parents, *parent_of], device, told, shown)
    return np.concatenate([ids[i][start:stop] for i, start, stop in cuts]), layout


def next_tokens(prompts: Sequence[Sequence[int]], device: torch.device | str) -> Layout:
    """The layout of a step: one new token for each of the sequences that answer these prompts."""
    return Layout.of([1] * len(prompts), device=device, pictures=[picture_of(prompt) for prompt in prompts])


def _common_beginnings(keys: Sequence[np.ndarray], groups: Sequence[int]) -> list[Node]:
    """The prefix trees of each group, one after the other."""
    nodes: list[Node] = []
    for group in sorted(set(groups)):
        own = [i for i, other in enumerate(groups) if other == group]
        first = len(nodes)
        for node in prefix_tree([keys[i] for i in own]):
            parent = node.parent + first if node.parent >= 0 else -1
            nodes.append(replace(node, parent=parent, members=tuple(own[i] for i in node.members)))
    return nodes


def _example(prompt: Sequence[int] | np.ndarray) -> Example:
    """A prompt as an example without an answer."""
    ids = np.asarray(prompt, np.int64)
    return Example(ids, np.zeros(len(ids), bool), "")
