"""Beam search, with the semantics of transformers' `early_stopping=False`.

Of the 2 x beams likeliest continuations of a prompt's beams, those among the first `beams` that end (EOS, stop
string, length) become candidates with the score

    sum of log-probabilities / (tokens, EOS included) ** length_penalty

and the first `beams` of the others go on. A prompt is done when it has `beams` candidates and its best open beam,
scored as if it ended now, is no better than the worst of them. More than one EOS token widens the choice to (1 + EOS
tokens) x beams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tunesmith.inference.answers import Answer, FinishReason, Job, Piece
from tunesmith.inference.prefill import forward_last, next_tokens
from tunesmith.inference.sample import process
from tunesmith.model.cache import Cache

NEVER = -1e9  # the score of a beam that only fills its place


@dataclass
class _Prompt:
    """One prompt's search: its open beams with their scores, best first, and its best finished candidates."""

    answers: Sequence[Answer]
    open: list[tuple[float, list[int]]] = field(default_factory=lambda: [(0.0, [])])
    done: list[tuple[float, list[int], FinishReason]] = field(default_factory=list)
    closed: bool = False

    def take(self, job: Job, scores: Sequence[float], tokens: Sequence[int], origins: Sequence[int]) -> list[int]:
        """Take the likeliest continuations, best first; returns the beam that each of the new open beams continues."""
        beams, penalty = job.settings.beams, job.settings.length_penalty
        going: list[tuple[float, list[int], int]] = []
        for rank, (score, token, origin) in enumerate(zip(scores, tokens, origins, strict=True)):
            ids = [*self.open[origin][1], token]
            reason = self._ending(job, ids)
            if reason is None:
                going.append((score, ids, origin))
            elif rank < beams:
                self.done.append((score / len(ids) ** penalty, ids, reason))
        self.done = sorted(self.done, key=lambda candidate: -candidate[0])[:beams]
        going = going[:beams]
        if not going or self._cannot_improve(beams, going[0][0] / len(going[0][1]) ** penalty):
            self.closed = True
            return []
        going += [(NEVER, going[0][1], going[0][2])] * (beams - len(going))
        self.open = [(score, ids) for score, ids, _ in going]
        return [origin for _, _, origin in going]

    def results(self) -> Iterator[Piece]:
        """The best candidates, one an answer; a stop string is cut off as in any other answer."""
        for answer, (_, ids, reason) in zip(self.answers, self.done, strict=False):
            text = "".join(answer.push(token, None) for token in ids)
            answer.reason = reason
            yield Piece(answer.index, text, answer.result())

    def _ending(self, job: Job, ids: list[int]) -> FinishReason | None:
        if ids[-1] in job.eos:
            return "eos"
        if job.settings.stop and job.tokenizer is not None:
            text = job.tokenizer.decode(ids)
            if any(stop in text for stop in job.settings.stop):
                return "stop"
        return "length" if len(ids) >= self.answers[0].limit else None

    def _cannot_improve(self, beams: int, best_open: float) -> bool:
        return len(self.done) >= beams and best_open <= self.done[-1][0]


@torch.inference_mode()
def beam_search(job: Job, answers: Sequence[Answer], cache: Cache, logits: Tensor) -> Iterator[Piece]:
    """Search from every sequence of the cache, given the logits after it; a finished prompt leaves the batch.

    `answers`: `settings.n` of each sequence, next to each other.
    """
    model, settings, n = job.model, job.settings, job.settings.n
    live = [_Prompt(answers[i : i + n]) for i in range(0, len(answers), n)]
    choices = max(2, 1 + len(job.eos)) * settings.beams
    while live:
        width = len(live[0].open)  # one beam at first, then all
        scores, picks = _likeliest(job, live, logits, choices)
        rows: list[int] = []
        for place, (prompt, best, pick) in enumerate(zip(live, scores.tolist(), picks.tolist(), strict=True)):
            vocab = logits.shape[-1]
            origins = prompt.take(job, best, [p % vocab for p in pick], [p // vocab for p in pick])
            rows += [place * width + origin for origin in origins]
        for prompt in live:
            if prompt.closed:
                yield from prompt.results()
        live = [prompt for prompt in live if not prompt.closed]
        if live:
            cache.keep(rows)
            tokens = [ids[-1] for prompt in live for _, ids in prompt.open]
            layout = next_tokens([prompt.answers[0].prompt for prompt in live for _ in prompt.open], model.device)
            acting = [prompt.answers[0].adapters for prompt in live for _ in prompt.open]
            logits = forward_last(model, tokens, layout, cache, acting, range(len(tokens)))


def _likeliest(job: Job, live: Sequence[_Prompt], logits: Tensor, choices: int) -> tuple[Tensor, Tensor]:
    """Scores and indices (beam * vocab + token) of each prompt's likeliest continuations, (prompts, choices)."""
    chances = logits.log_softmax(-1)
    if job.settings.repetition_penalty != 1.0:
        seen = torch.zeros(chances.shape, dtype=torch.bool, device=chances.device)
        for row, ids in enumerate([*p.answers[0].prompt, *ids] for p in live for _, ids in p.open):
            seen[row, torch.as_tensor(ids, device=seen.device)] = True
        chances = process(chances, job.settings, seen)
    before = torch.tensor([score for p in live for score, _ in p.open], dtype=chances.dtype, device=chances.device)
    total = (chances + before[:, None]).view(len(live), -1)
    best = total.topk(min(choices, total.shape[1]), dim=-1)
    return best.values, best.indices
