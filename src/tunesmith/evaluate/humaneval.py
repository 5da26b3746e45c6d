"""HumanEval: functions completed from their signature and description, and run against tests (arXiv:2107.03374).

    pass@k = E over problems of 1 - C(n-c, k) / C(n, k),    n samples of which c pass

A published row is {"task_id", "prompt", "entry_point", "test"}. What runs is prompt + completion + test + a call of
check(ENTRY_POINT), in a process that can do no harm (see containment.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass as settings_class

from tunesmith.config import STRICT
from tunesmith.data.encode import encode_prompt
from tunesmith.data.schemas import chat_row
from tunesmith.errors import DataError
from tunesmith.evaluate.containment import Ending, Limits, run_programs
from tunesmith.evaluate.diversity import distinct, unique_strings
from tunesmith.evaluate.figures import Figure, mean, share
from tunesmith.evaluate.generations import answers_to
from tunesmith.evaluate.published import plain_prompt, text_of
from tunesmith.evaluate.subject import Subject
from tunesmith.evaluate.tasks import Result, Task, read_items
from tunesmith.inference.sample import GenerationSettings

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # of the paper: the function has ended there
BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
ASK = "Complete this Python function. Answer with the whole function in one block of code.\n\n```python\n{}\n```"
BY_HOOK = (
    "this system has no filter of system calls that is known here: programs were held by Python's audit hook alone, "
    "which stops Python code and not machine code"
)


@settings_class(frozen=True, kw_only=True, config=STRICT)
class HumanEvalSettings:
    """How functions are asked for, how many samples are drawn, and what a program may use."""

    samples: int = Field(default=1, ge=1, description="Completions drawn a problem; above 1 needs a temperature.")
    k: tuple[int, ...] = Field(default=(1,), description="The k of pass@k, none above samples.")
    temperature: float = Field(default=0.0, ge=0, description="0 takes the likeliest token; the paper's is 0.2 to 0.8.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Sample among the likeliest that sum to P.")
    seed: int = Field(default=0, ge=0, description="Seed of sampling.")
    template: bool = Field(
        default=False, description="Ask in the adapter's or the model's template, not as plain text."
    )
    max_new_tokens: int = Field(default=512, ge=1, description="Longest completion in tokens.")
    seconds: int = Field(default=3, ge=1, description="CPU time of one program.")
    memory: int = Field(default=1024, ge=64, description="Address space of one program, in MiB.")

    @model_validator(mode="after")
    def _k_within_samples(self) -> Self:
        if not self.k or min(self.k) < 1 or max(self.k) > self.samples:
            raise ValueError(f"k: each should be from 1 to samples={self.samples}; draw more samples")
        if self.samples > 1 and not self.temperature:
            raise ValueError("samples: with temperature=0 they would all be the same; set temperature=0.2")
        return self


@dataclass(frozen=True)
class Problem:
    """A function to complete: `prompt` is its signature and description, `test` defines check(candidate)."""

    source: str
    task_id: str
    prompt: str
    entry_point: str
    test: str


def read(path: Path, settings: HumanEvalSettings) -> list[Problem]:
    """The problems of a published file (.jsonl, .jsonl.gz, .parquet). Raises DataError with file and line."""
    return read_items(path, _problem)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that at least one of k samples passes, where `right` of `samples` did; 1 <= k <= samples."""
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def program(problem: Problem, completion: str) -> str:
    """What is run: it ends without an exception where the completion passes."""
    return f"{problem.prompt}{completion}\n\n{problem.test}\n\ncheck({problem.entry_point})\n"


def completion_of(answer: str) -> str:
    """What follows the prompt, from a chat answer: its first block of code, or all of it where it has none.

    Code that defines the function again replaces the one that the prompt began.
    """
    found = BLOCK.search(answer)
    return f"\n{answer if found is None else found[1]}"


def measure(subject: Subject, problems: Sequence[Problem], settings: HumanEvalSettings) -> Result:
    """`pass@K` for each k; `timed_out`, `unfinished`, `distinct_2`; with several samples `unique...`.

    Raises ResourceError where programs cannot be confined.
    """
    texts, unfinished = completions(subject, problems, settings)
    sources = [program(p, text) for p, drawn in zip(problems, texts, strict=True) for text in drawn]
    endings = run_programs(sources, Limits(settings.seconds, settings.memory))
    n = settings.samples
    grouped = [endings[i * n : (i + 1) * n] for i in range(len(problems))]
    figures, each = _passes(grouped, settings)
    figures["timed_out"] = share([ending.how == "timed out" for ending in endings], higher_is_better=False)
    figures["unfinished"] = share(unfinished, higher_is_better=False)
    if n > 1:
        figures |= unique_strings(texts, [[ending.passed for ending in drawn] for drawn in grouped])
    figures["distinct_2"] = Figure(distinct([text for drawn in texts for text in drawn], 2), len(sources))
    stated = {**{name: getattr(settings, name) for name in _STATED}, "confined_by": list(endings[0].held)}
    samples = [
        {"task_id": p.task_id, "how": ending.how, "detail": ending.detail, "completion": text}
        for p, drawn, ended in zip(problems, texts, grouped, strict=True)
        for text, ending in zip(drawn, ended, strict=True)
    ]
    notes = [] if all(ending.by_kernel for ending in endings if ending.held) else [BY_HOOK]
    return Result(figures, stated, each, samples, notes)


_STATED = ("samples", "temperature", "top_p", "seed", "template", "max_new_tokens", "seconds", "memory")


def completions(
    subject: Subject, problems: Sequence[Problem], settings: HumanEvalSettings
) -> tuple[list[list[str]], list[bool]]:
    """The completions of every problem, and of each in turn whether it had not ended."""
    if settings.template:
        rows = [chat_row([{"role": "user", "content": ASK.format(p.prompt.rstrip())}], p.source) for p in problems]
        prompts: list[list[int]] = [encode_prompt(row, subject.template, subject.tokenizer) for row in rows]
    else:
        prompts = [plain_prompt(subject.tokenizer, p.prompt) for p in problems]
    sampling = GenerationSettings(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        n=settings.samples,
        stop=subject.template.stop if settings.template else STOP,
        seed=settings.seed,
    )
    answers = answers_to(subject, prompts, sampling)
    n = settings.samples
    texts = [[answer.text for answer in answers[i * n : (i + 1) * n]] for i in range(len(problems))]
    if settings.template:
        texts = [[completion_of(text) for text in drawn] for drawn in texts]
    return texts, [answer.finish_reason == "length" for answer in answers]


def _passes(
    grouped: Sequence[Sequence[Ending]], settings: HumanEvalSettings
) -> tuple[dict[str, Figure], dict[str, list[float]]]:
    right = [sum(ending.passed for ending in drawn) for drawn in grouped]
    each = {f"pass@{k}": [pass_at_k(settings.samples, c, k) for c in right] for k in settings.k}
    if settings.samples == 1:
        return {name: share(values) for name, values in each.items()}, each
    return {name: mean(values) for name, values in each.items()}, each


def _problem(raw: Any, where: str) -> Problem:
    texts = {key: text_of(raw, key, where) for key in ("task_id", "prompt", "entry_point", "test")}
    if not texts["entry_point"].isidentifier():
        raise DataError(f"{where}: entry_point {texts['entry_point'][:60]!r} is no name of a function; correct the row")
    return Problem(where, **texts)


TASK = Task("humaneval", "functions completed and run against tests", HumanEvalSettings, read, measure)
