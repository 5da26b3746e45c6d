"""Our model, with any adapter, as an `LM` of lm-evaluation-harness: its whole list of tasks runs on it.

    import lm_eval
    from tunesmith.evaluate.harness import TunesmithLM

    lm_eval.simple_evaluate(TunesmithLM(subject), tasks=["arc_easy"])

Tokens are cut as the library's own Hugging Face backend cuts them, and what is too long loses its beginning alike, so
in equal precision both give equal numbers. Scores come from `score_pairs`, which computes once what requests share.
Needs the extra `harness`; only evaluation.py imports this file, and only when it is asked to.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from tunesmith.config import STRICT, validate_section
from tunesmith.data.schemas import Row, Turn
from tunesmith.errors import ConfigError, DataError, did_you_mean
from tunesmith.evaluate.choice import fit
from tunesmith.evaluate.figures import Figure, Z
from tunesmith.evaluate.subject import Subject
from tunesmith.inference.generate import generate
from tunesmith.inference.prefill import context_limit
from tunesmith.inference.sample import GenerationSettings
from tunesmith.inference.score import score_pairs

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the libraries are first imported
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
try:
    import lm_eval
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ConfigError(
        f"--harness: needs lm-evaluation-harness ({error}); install it: pip install 'tunesmith[harness]'"
    ) from None

MAX_LENGTH = 2048  # of a model that has no limit
MAX_NEW_TOKENS = 256  # of an answer, where a task does not say
SAMPLING = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HarnessSettings:
    """How its tasks are run; what a task itself says stays."""

    shots: int | None = Field(default=None, ge=0, description="Solved examples; none is each task's own number.")
    template: bool = Field(default=False, description="Ask in the adapter's or the model's template.")
    include: str | None = Field(default=None, description="Folder with more tasks, as YAML files.")


class TunesmithLM(TemplateLM):
    """The model of `subject`, with its acting adapters and its template. `max_length`: tokens that it may read."""

    def __init__(self, subject: Subject, max_length: int | None = None) -> None:
        super().__init__()
        self.subject = subject
        self.max_length = max_length or context_limit(subject.model.config) or MAX_LENGTH
        self._device = subject.model.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.prefix_token_id if self.subject.tokenizer.eos_id is None else self.subject.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, or else EOS."""
        tokenizer = self.subject.tokenizer
        found = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if found is None:
            raise ConfigError("--harness: this model's tokenizer has neither BOS nor EOS, which an empty context needs")
        return found

    @property
    def tokenizer_name(self) -> str:
        """Identifies tokenizer and template for the library's caches."""
        marks = self.subject.tokenizer.fingerprint()["sha256"], self.subject.template.fingerprint()["sha256"]
        return "-".join(mark[:16] for mark in marks)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: Any) -> list[int]:
        """Ids of a text, special tokens in it included; BOS first where the tokenizer adds it and it is not there."""
        tokenizer = self.subject.tokenizer
        ids = tokenizer.encode(string, special=True)
        bos = tokenizer.bos_id if tokenizer.add_bos and add_special_tokens is not False else None
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **ignored: Any
    ) -> list[tuple[float, bool]]:
        pairs = [fit((context, continuation), self.max_length) for _, context, continuation in requests]
        subject = self.subject
        found = score_pairs(subject.model, pairs, adapters=subject.adapters, pack_tokens=subject.budget)
        answers = [(score.logprob, score.greedy) for score in found]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:  # a window of a rolling request is no request
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, window by window, each with as much context as fits."""
        totals = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            parts = [(None, *utils.make_disjoint_window(window)) for window in windows]
            totals.append(sum(chance for chance, _ in self._loglikelihood_tokens(parts)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, cut before the first of each request's stop strings; all requests with equal settings together."""
        groups: dict[GenerationSettings, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(settings_of(request.args[1]), []).append(number)
        answers = [""] * len(requests)
        for settings, members in groups.items():
            room = self.max_length - settings.max_new_tokens
            if room < 1:
                raise ConfigError(
                    f"--harness: max_gen_toks={settings.max_new_tokens} leaves no room for a question in the model's "
                    f"context of {self.max_length}"
                )
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in members]
            found = generate(
                self.subject.model,
                prompts,
                settings,
                eos_ids=self.subject.tokenizer.eos_ids,
                tokenizer=self.subject.tokenizer,
                adapters=self.subject.adapters,
            )
            for number, answer in zip(members, found, strict=True):
                answers[number] = answer.text
                self.cache_hook.add_partial("generate_until", requests[number].args, answer.text)
        return answers

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What the library writes down of the template."""
        return str(self.subject.template.source()) if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the adapter's or the model's template, up to where the answer begins (or goes on)."""
        turns = tuple(Turn(message["role"], message["content"]) for message in chat_history)
        begun = "" if add_generation_prompt else turns[-1].text
        turns = turns if add_generation_prompt else turns[:-1]
        asked = next((turn.text for turn in reversed(turns) if turn.role == "user"), "")
        row = Row(
            "harness", "messages", turns, fields={"instruction": asked, "input": "", "prompt": asked, "output": ""}
        )
        return "".join(segment.text for segment in self.subject.template.prompt(row)) + begun


def settings_of(kwargs: Mapping[str, Any]) -> GenerationSettings:
    """Generation settings of a task's `generation_kwargs`. Raises ConfigError for those that have no counterpart."""
    given: dict[str, Any] = dict(normalize_gen_kwargs(dict(kwargs), MAX_NEW_TOKENS))
    until = given.pop("until", None) or []
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    settings: dict[str, Any] = {"max_new_tokens": given.pop("max_gen_toks"), "stop": stop}
    samples = given.pop("do_sample", False) and given.get("temperature", 0)
    for name, value in given.items():
        if name not in SAMPLING:
            raise ConfigError(f"--harness: a task asks for {name}={value!r}, which generation here does not know")
        if samples or name == "repetition_penalty":
            settings[name] = value
    return GenerationSettings(**settings)


@plain_dataclass(frozen=True)
class Harness:
    """Tasks of the library, found and ready to run."""

    names: tuple[str, ...]
    settings: HarnessSettings
    manager: TaskManager

    def run(self, subject: Subject, limit: int | None = None) -> dict[str, Any]:
        """Of each task its figures, with intervals from the library's standard errors. Raises DataError."""
        try:
            found = lm_eval.simple_evaluate(
                TunesmithLM(subject),
                tasks=list(self.names),
                num_fewshot=self.settings.shots,
                limit=limit,
                apply_chat_template=self.settings.template,
                fewshot_as_multiturn=self.settings.template,
                task_manager=self.manager,
                log_samples=False,
                bootstrap_iters=1000,
            )
        except (OSError, ValueError) as error:  # of the library that fetches data sets, above all
            raise DataError(f"--harness {', '.join(self.names)}: {error}") from error
        return {name: self._report(name, found, limit) for name in found["results"]}

    def _report(self, name: str, found: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
        better = found.get("higher_is_better", {}).get(name, {})
        count = found.get("n-samples", {}).get(name, {}).get("effective", 0)
        stated = {
            "shots": found.get("n-shot", {}).get(name),
            "template": self.settings.template,
            "limit": limit,
            "library": f"lm-eval {lm_eval.__version__}",
            "version": found["versions"].get(name),
        }
        figures = _figures(found["results"][name], better, count)
        return {"figures": {key: figure.to_dict() for key, figure in figures}, "stated": stated}


def find_harness(names: Sequence[str], given: Mapping[str, Any]) -> Harness:
    """The library's tasks `names` with these settings. Raises ConfigError for an unknown one."""
    settings: HarnessSettings = validate_section(HarnessSettings, given, "harness")
    manager = TaskManager(include_path=settings.include, include_defaults=False) if settings.include else None
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=settings.include)  # reads thousands of files
    for name in names:
        if name not in manager.all_tasks:
            raise ConfigError(f"--harness {name}: the library has no such task{did_you_mean(name, manager.all_tasks)}")
    return Harness(tuple(names), settings, manager)


def _figures(row: Mapping[str, Any], better: Mapping[str, Any], count: int) -> list[tuple[str, Figure]]:
    """("acc", figure) of "acc,none" and "acc_stderr,none"; a filter other than none is part of the name."""
    figures = []
    for key, value in row.items():
        name, comma, how = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = row.get(f"{name}_stderr,{how}")
        interval = (value - Z * error, value + Z * error) if isinstance(error, int | float) else None
        figure = Figure(float(value), count, interval, better.get(name) is not False)
        figures.append((name if how == "none" else f"{name}.{how}", figure))
    return figures
