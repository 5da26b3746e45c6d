"""Text from prompts: greedy, sampled or by beams, for a batch of ragged prompts, with a key/value cache.

    prompts -> groups that fit the cache -> prefill (one packed row) -> [ choose, push, drop the finished, step ] ...

`stream` yields pieces as they come; `generate` collects them. An answer's tokens depend on its prompt, the settings
and its seed, not on what else is in the batch (up to the rounding of a batched product).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat

import torch
from torch import Tensor

from tunesmith.errors import GenerationError
from tunesmith.inference.answers import Answer, Generation, Job, Piece
from tunesmith.inference.beams import beam_search
from tunesmith.inference.prefill import check_adapters, check_prompt, context_limit, forward_last, next_tokens, prefill
from tunesmith.inference.sample import GenerationSettings, choose, generator_for, process
from tunesmith.inference.text import TextTokenizer
from tunesmith.model.cache import Cache
from tunesmith.model.llama import Llama

CACHE_BYTES = 1 << 30  # keys and values of the sequences generated at once
PREFILL_TOKENS = 8192  # prompt tokens of one pass: bounds its activations
FIRST_ROOM = 128  # new tokens that a cache has room for at first; it grows where answers get longer


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings | None = None,
    *,
    eos_ids: Collection[int],
    tokenizer: TextTokenizer | None = None,
    adapters: tuple[str, ...] | None = None,
    routes: Sequence[tuple[str, ...]] | None = None,
    seeds: Sequence[int] | None = None,
    logprobs: bool = False,
    share_prefix: bool = True,
    cache_bytes: int = CACHE_BYTES,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """Answer every prompt (token ids); `settings.n` answers a prompt, next to each other, in the order of the prompts.

    `tokenizer` is needed for text and stop strings. `adapters`: the attached ones that act (None: all, (): the bare
    base); `routes`: instead, those that act on each prompt, so that one batch may use several. `seeds` gives each
    prompt a seed of its own in place of `settings.seed`. `share_prefix=False` computes a common preamble for every
    prompt anew. `on_text(index, text)` is called with every piece as it comes. Raises GenerationError for a prompt that
    is empty, too long, or of another vocabulary; AdapterError for an adapter that is not attached, or changed the base.
    """
    settings = settings or GenerationSettings()
    results: list[Generation | None] = [None] * (len(prompts) * settings.n)
    pieces = stream(
        model, prompts, settings, eos_ids=eos_ids, tokenizer=tokenizer, adapters=adapters, routes=routes, seeds=seeds,
        logprobs=logprobs, share_prefix=share_prefix, cache_bytes=cache_bytes,
    )  # fmt: skip
    for piece in pieces:
        if on_text is not None and piece.text:
            on_text(piece.index, piece.text)
        if piece.result is not None:
            results[piece.index] = piece.result
    return [result for result in results if result is not None]


def stream(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings | None = None,
    *,
    eos_ids: Collection[int],
    tokenizer: TextTokenizer | None = None,
    adapters: tuple[str, ...] | None = None,
    routes: Sequence[tuple[str, ...]] | None = None,
    seeds: Sequence[int] | None = None,
    logprobs: bool = False,
    share_prefix: bool = True,
    cache_bytes: int = CACHE_BYTES,
) -> Iterator[Piece]:
    """Yield the text of all answers piece by piece; the arguments are those of `generate`.

    Closing the iterator stops the work.

    A piece holds complete characters only, and nothing that may still become a stop string. Beams give one piece an
    answer. Until the iterator ends or is closed the model is in evaluation mode.
    """
    job = make_job(model, settings, eos_ids, tokenizer, adapters, logprobs, share_prefix, routes)
    for number, prompt in enumerate(prompts):
        check_prompt(model.config, prompt, f"prompt {number + 1}")
    for what, given in (("seeds", seeds), ("routes", routes)):
        if given is not None and len(given) != len(prompts):
            raise GenerationError(f"generation: {len(given)} {what} for {len(prompts)} prompts; give one a prompt")
    return _stream_groups(job, prompts, seeds, cache_bytes)


def make_job(
    model: Llama,
    settings: GenerationSettings | None,
    eos_ids: Collection[int],
    tokenizer: TextTokenizer | None = None,
    adapters: tuple[str, ...] | None = None,
    logprobs: bool = False,
    share_prefix: bool = True,
    routes: Sequence[tuple[str, ...]] | None = None,
) -> Job:
    """Check what all answers share. Raises GenerationError, AdapterError."""
    settings = settings or GenerationSettings()
    if settings.stop and tokenizer is None:
        raise GenerationError("generation: stop strings need a tokenizer to be found in the text; pass tokenizer=")
    if logprobs and settings.beams > 1:
        raise GenerationError(f"generation: logprobs are not kept with beams={settings.beams}; set beams=1")
    if adapters is not None and routes is not None:
        raise GenerationError("generation: adapters act on every prompt, routes on each its own; give one of the two")
    for names in [adapters] if routes is None else set(routes):
        check_adapters(model, names)
    return Job(model, settings, frozenset(eos_ids), tokenizer, adapters, logprobs, share_prefix, routes)


@torch.inference_mode()
def _stream_groups(
    job: Job, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None, cache_bytes: int
) -> Iterator[Piece]:
    n = job.settings.n
    with evaluation_mode(job.model):
        for group in _groups(job, prompts, cache_bytes):
            chosen = [prompts[i] for i in group]
            room = min(job.settings.max_new_tokens, FIRST_ROOM)
            cache, logits = prefill(job.model, chosen, room, [job.acting(i) for i in group], job.share_prefix)
            answers = [
                new_answer(
                    job, i * n + j, prompts[i], j, seeds[i] if seeds is not None else job.settings.seed, job.acting(i)
                )
                for i in group
                for j in range(n)
            ]
            if job.settings.beams > 1:
                yield from beam_search(job, answers, cache, logits)
                continue
            if n > 1:
                cache.keep([row for row in range(len(group)) for _ in range(n)])
                logits = logits.repeat_interleave(n, dim=0)
            yield from decode(job, answers, cache, logits)


def new_answer(
    job: Job,
    index: int,
    prompt: Sequence[int],
    number: int = 0,
    seed: int | None = None,
    adapters: tuple[str, ...] | None = None,
) -> Answer:
    """The empty answer number `number` to a prompt, with as many tokens ahead as settings and context allow."""
    return Answer(index, job, prompt, most_tokens(job, prompt), generator_for(seed, number), adapters)


def most_tokens(job: Job, prompt: Sequence[int]) -> int:
    """How long an answer to this prompt may get, by the settings and the model's context."""
    limit = context_limit(job.model.config)
    return job.settings.max_new_tokens if limit is None else min(job.settings.max_new_tokens, limit - len(prompt))


def _groups(job: Job, prompts: Sequence[Sequence[int]], cache_bytes: int) -> Iterator[list[int]]:
    """Cut the prompts, longest first, into groups whose cache and first pass stay within their budgets."""
    config, settings = job.model.config, job.settings
    element = torch.empty(0, dtype=job.model.dtype).element_size()
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * element
    copies = max(settings.n, settings.beams)
    group: list[int] = []
    longest = fed = 0
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        longest = max(longest, len(prompts[i]))
        held = (len(group) + 1) * copies * (longest + settings.max_new_tokens) * token
        if group and (held > cache_bytes or fed + len(prompts[i]) > PREFILL_TOKENS):
            yield group
            group, longest, fed = [], len(prompts[i]), 0
        group.append(i)
        fed += len(prompts[i])
    if group:
        yield group


@torch.inference_mode()
def decode(job: Job, answers: Sequence[Answer], cache: Cache, logits: Tensor) -> Iterator[Piece]:
    """Continue every sequence of the cache, given the logits after it, until its answer ends.

    What is finished leaves the batch.
    """
    model, settings, live = job.model, job.settings, list(answers)
    seen = seen_tokens([answer.prompt for answer in live], logits) if settings.repetition_penalty != 1.0 else None
    while live:
        tokens = choose(process(logits, settings, seen), settings, [answer.generator for answer in live])
        chances = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist() if job.logprobs else repeat(None)
        for answer, token, chance in zip(live, tokens.tolist(), chances, strict=False):
            text = answer.push(token, chance)
            if text or answer.reason is not None:
                yield Piece(answer.index, text, answer.result() if answer.reason is not None else None)
        rows = [row for row, answer in enumerate(live) if answer.reason is None]
        if not rows:
            return
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        if len(rows) < len(live):
            cache.keep(rows)
            live, tokens = [live[row] for row in rows], tokens[rows]
            seen = seen[rows] if seen is not None else None
        layout = next_tokens([answer.prompt for answer in live], model.device)
        logits = forward_last(model, tokens, layout, cache, [answer.adapters for answer in live], range(len(live)))


def seen_tokens(prompts: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    """(rows, vocab) bool: the tokens that each row's prompt holds."""
    seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    for row, prompt in enumerate(prompts):
        seen[row, torch.as_tensor(prompt, device=seen.device)] = True
    return seen


@contextmanager
def evaluation_mode(model: Llama) -> Iterator[None]:
    """Every module in evaluation mode (no dropout), and afterwards each as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
