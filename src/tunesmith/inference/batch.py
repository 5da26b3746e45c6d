"""Continuous batching: answers join and leave a running batch at every step, each with its own settings and adapters.

    admit   prompts -> [ known beginnings from the prefix cache, the rest in one packed pass ] -> first tokens -> slots
    step    every slot's last token -> one pass -> next tokens; what has ended leaves in the same step

An answer's tokens are those that its prompt gets alone, as in generate.py: they depend on prompt, settings and seed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tunesmith.data.pack import NOTHING
from tunesmith.errors import GenerationError
from tunesmith.inference.answers import Answer, Generation, Job
from tunesmith.inference.generate import CACHE_BYTES, PREFILL_TOKENS, most_tokens, new_answer, seen_tokens
from tunesmith.inference.prefill import forward_last, next_tokens, prefill
from tunesmith.inference.prefixes import PrefixCache
from tunesmith.inference.sample import GenerationSettings, choose, process
from tunesmith.model.cache import Cache
from tunesmith.model.layout import Layout
from tunesmith.model.llama import Llama
from tunesmith.model.slots import SlotCache

ROWS = 32  # answers generated at once
PREFIX_BYTES = 1 << 28


@dataclass(frozen=True, eq=False)
class Ask:
    """A prompt (token ids) and how to answer it: `n` answers with `job`'s settings, tokenizer and adapters.

    `likeliest`: with job.logprobs, how many alternatives are told for each token. `key` names what the prompt is read
    with (base, adapter, version): prompts of one key may share what they begin with; None: never.
    """

    prompt: Sequence[int]
    job: Job
    n: int = 1
    likeliest: int = 0
    key: Hashable | None = None

    @property
    def adapters(self) -> tuple[str, ...]:
        """Those that act."""
        return self.job.adapters or ()


@dataclass(frozen=True)
class Told:
    """One token of an answer, its log-probability, and the likeliest tokens there with theirs."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Said:
    """What answer `number` to `ask` gained: a piece of text, and tokens where log-probabilities were asked for.

    The answer's last one carries its `result`, or the `fault` that ended it. `known`: how many of the prompt's tokens
    the prefix cache held.
    """

    ask: Ask
    number: int
    text: str
    tokens: tuple[Told, ...] = ()
    result: Generation | None = None
    fault: str = ""
    known: int = 0


@dataclass(eq=False)
class Row:
    """One answer in the making; `token` is its last one, which the model has not read yet.

    `how` are the settings that decide the next token: rows that agree in them are chosen together.
    """

    ask: Ask
    number: int
    answer: Answer
    known: int = 0
    token: int = -1
    told: list[Told] = field(default_factory=list)
    sent: int = 0
    seen: Tensor | None = None  # (vocab,) bool: the tokens so far, for the repetition penalty

    def __post_init__(self) -> None:
        self.how: GenerationSettings = replace(self.ask.job.settings, max_new_tokens=1, stop=(), seed=None)

    def push(self, token: int, told: Told | None) -> Said:
        """Take the next token."""
        self.token = token
        if told is not None:
            self.told.append(told)
        text = self.answer.push(token, None)
        ended = self.answer.reason is not None
        del self.told[len(self.answer.ids) :]  # EOS, and what a stop string took back
        upto = len(self.told) if ended or not self.told else self.answer.settled
        tokens = tuple(self.told[self.sent : upto])
        self.sent = max(self.sent, upto)
        result = self.answer.result() if ended else None
        return Said(self.ask, self.number, text, tokens, result, known=self.known)

    def failed(self, fault: str) -> Said:
        """End it without a result."""
        return Said(self.ask, self.number, "", fault=fault, known=self.known)


class RunningBatch:
    """At most `most` answers at once, whose keys and values never take more than `cache_bytes`.

    The caller keeps the model in evaluation mode, calls from one thread, and keeps every adapter in place while a row
    uses it.
    """

    def __init__(
        self, model: Llama, *, most: int = ROWS, cache_bytes: int = CACHE_BYTES, prefix_bytes: int = PREFIX_BYTES
    ) -> None:
        self.model, self.most = model, most
        config = model.config
        element = torch.empty(0, dtype=model.dtype).element_size()
        self._token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * element
        self.budget = cache_bytes // self._token  # tokens of all rows together
        self.prefixes = PrefixCache(prefix_bytes)
        self.cache = SlotCache(config, model.dtype, model.device)
        self.rows: list[Row] = []

    def check(self, ask: Ask) -> None:
        """Raise GenerationError for what this batch could never hold."""
        if ask.n > self.most or ask.n * self.longest(ask) > self.budget:
            mib = ask.n * self.longest(ask) * self._token / (1 << 20)
            raise GenerationError(
                f"{ask.n} answers of up to {self.longest(ask)} tokens, prompt included, need {mib:.0f} MiB of keys and "
                f"values; there is room for {self.most} answers and {self.budget * self._token / (1 << 20):.0f} MiB: "
                "ask for fewer or shorter ones"
            )

    def longest(self, ask: Ask) -> int:
        """The most tokens that a row of `ask` may come to hold."""
        virtual = sum(
            getattr(delta, "virtual_tokens", 0) + getattr(delta, "visual_tokens", 0)
            for name, delta in self.model.model.embed.items()
            if name in ask.adapters
        )
        return len(ask.prompt) + self.model.needs(ask.adapters).infix + virtual + most_tokens(ask.job, ask.prompt)

    def fitting(self, waiting: Iterable[Ask]) -> list[Ask]:
        """The first of these that fit beside what runs, in their order, for one pass."""
        found: list[Ask] = []
        rows, longest, fed = len(self.rows), max((self.longest(row.ask) for row in self.rows), default=0), 0
        for ask in waiting:
            rows, longest, fed = rows + ask.n, max(longest, self.longest(ask)), fed + len(ask.prompt)
            if rows > self.most or rows * longest > self.budget or (found and fed > PREFILL_TOKENS):
                break
            found.append(ask)
        return found

    @torch.inference_mode()
    def admit(self, asks: Sequence[Ask]) -> list[Said]:
        """Read these prompts, choose their answers' first tokens, and let what goes on join the batch."""
        said: list[Said] = []
        shared = [self.prefixes.find(ask.key, ask.prompt) if self._shares(ask) else None for ask in asks]
        cold = [ask for ask, found in zip(asks, shared, strict=True) if found is None]
        warm = [(ask, *found) for ask, found in zip(asks, shared, strict=True) if found is not None]
        if cold:
            cache, logits = prefill(self.model, [ask.prompt for ask in cold], 0, [ask.adapters for ask in cold])
            said += self._begin(cold, [0] * len(cold), cache, logits)
        if warm:
            some, known = [ask for ask, _, _ in warm], [common for _, _, common in warm]
            longest = max(held.virtual + len(ask.prompt) for ask, held, _ in warm)
            cache = Cache(self.model.config, len(warm), longest, self.model.dtype, self.model.device)
            for row, (_, held, common) in enumerate(warm):
                held.into(cache, row, common)
            said += self._begin(some, known, cache, self._go_on(some, known, cache))
        return said

    @torch.inference_mode()
    def step(self) -> list[Said]:
        """One more token for every row."""
        if not self.rows:
            return []
        tokens = torch.tensor([row.token for row in self.rows])
        layout = next_tokens([row.ask.prompt for row in self.rows], self.model.device)
        logits = forward_last(
            self.model, tokens, layout, self.cache, [row.ask.adapters for row in self.rows], range(len(self.rows))
        )
        said, ended = self._advance(self.rows, logits)
        self._leave(ended)
        return said

    @torch.inference_mode()
    def drop(self, asks: Iterable[Ask]) -> None:
        """Stop answering these: their slots are free at once."""
        gone = set(map(id, asks))
        self._leave([number for number, row in enumerate(self.rows) if id(row.ask) in gone])

    @torch.inference_mode()
    def clear(self) -> None:
        """Stop everything, and forget every prompt."""
        self.rows.clear()
        self.cache.clear()
        self.prefixes.forget()

    def _shares(self, ask: Ask) -> bool:
        """An end of a prompt that an adapter edited is no end in a longer prompt, so that is not shared."""
        return ask.key is not None and self.model.needs(ask.adapters) == NOTHING

    def _go_on(self, asks: Sequence[Ask], known: Sequence[int], cache: Cache) -> Tensor:
        """Read what is left of prompts whose beginnings the cache holds; the logits after each."""
        rest = [list(ask.prompt[common:]) for ask, common in zip(asks, known, strict=True)]
        layout = Layout.of([len(tokens) for tokens in rest], device=self.model.device)
        ends = [start + length - 1 for start, length in zip(layout.starts, layout.lengths, strict=True)]
        fed = [token for tokens in rest for token in tokens]
        return forward_last(self.model, fed, layout, cache, [ask.adapters for ask in asks], ends)

    def _begin(self, asks: Sequence[Ask], known: Sequence[int], cache: Cache, logits: Tensor) -> list[Said]:
        """The first tokens after prompts that `cache` holds; sequence i of it is asks[i]'s."""
        rows = [
            Row(ask, number, new_answer(ask.job, number, ask.prompt, number, ask.job.settings.seed), some)
            for ask, some in zip(asks, known, strict=True)
            for number in range(ask.n)
        ]
        source = [at for at, ask in enumerate(asks) for _ in range(ask.n)]
        for row, at in zip(rows, source, strict=True):
            if row.how.repetition_penalty != 1.0:
                row.seen = seen_tokens([row.ask.prompt], logits[at : at + 1])[0]
        for at, ask in enumerate(asks):
            if self._shares(ask) and bool(logits[at].isfinite().any()):
                self.prefixes.put(ask.key, ask.prompt, cache, at)
        said, ended = self._advance(rows, logits[source])
        living = [(row, at) for number, (row, at) in enumerate(zip(rows, source, strict=True)) if number not in ended]
        everyone = [*self.rows, *(row for row, _ in living)]
        self.cache.most_tokens = max((self.longest(row.ask) for row in everyone), default=1)
        self.cache.most_rows = min(self.most, self.budget // self.cache.most_tokens)
        for at in dict.fromkeys(at for _, at in living):
            own = [row for row, source in living if source == at]
            self.cache.join(cache, at, len(own))
            self.rows += own
        return said

    def _advance(self, rows: Sequence[Row], logits: Tensor) -> tuple[list[Said], list[int]]:
        """Choose and take the next token of every row; also the numbers of those that have ended, in order."""
        sound = logits.amax(-1).isfinite().tolist()  # one row's fault is not the others'
        tokens = self._choose(rows, logits)
        said, ended = [], []
        for number, (row, token, fine) in enumerate(zip(rows, tokens.tolist(), sound, strict=True)):
            if fine:
                told = _told(row.ask, logits[number], token) if row.ask.job.logprobs else None
                said.append(row.push(token, told))
            else:
                said.append(row.failed("the model's logits are not finite with this adapter and prompt"))
            if said[-1].result is not None or not fine:
                ended.append(number)
        return said, ended

    def _choose(self, rows: Sequence[Row], logits: Tensor) -> Tensor:
        """The next token of every row, (rows,), rows of equal settings together."""
        alike: dict[GenerationSettings, list[int]] = {}
        for number, row in enumerate(rows):
            alike.setdefault(row.how, []).append(number)
        tokens = torch.zeros(len(rows), dtype=torch.int64, device=logits.device)
        for how, numbers in alike.items():
            at = torch.tensor(numbers, device=logits.device)
            found = [seen for number in numbers if (seen := rows[number].seen) is not None]
            draws = [rows[number].answer.generator for number in numbers]
            chosen = choose(process(logits[at], how, torch.stack(found) if found else None), how, draws)
            for seen, token in zip(found, chosen, strict=False):
                seen[token] = True
            tokens[at] = chosen
        return tokens

    def _leave(self, numbers: Iterable[int]) -> None:
        """Take rows out; the last one takes the place of each, as in the cache."""
        for number in sorted(numbers, reverse=True):
            self.cache.leave(number)
            last = self.rows.pop()
            if number < len(self.rows):
                self.rows[number] = last


def _told(ask: Ask, logits: Tensor, token: int) -> Told:
    chances = logits.log_softmax(-1)
    best = chances.topk(min(ask.likeliest, len(chances))) if ask.likeliest else None
    likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True) if best is not None else ()
    return Told(token, float(chances[token]), tuple(likeliest))
