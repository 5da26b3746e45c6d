"""A tournament from start to tables: answers, judgments, ratings; the rooms below do the work.

OUT/answers/NAME.jsonl   what each contestant of ours answered        OUT/judgments.jsonl   a line a comparison
OUT/report.md, report.json
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunesmith import api
from tunesmith.adapters.peft_format import adapter_folder
from tunesmith.errors import ConfigError
from tunesmith.evaluate.tournament.answers import Question, Reply, read_questions, read_replies
from tunesmith.evaluate.tournament.endpoint import Endpoint
from tunesmith.evaluate.tournament.files import Found, collect, sort_out
from tunesmith.evaluate.tournament.judge import Judge, games_to_judge, judge_games
from tunesmith.evaluate.tournament.judgments import Kind, read_judgments
from tunesmith.evaluate.tournament.local import LocalModel, answer_questions
from tunesmith.evaluate.tournament.report import Rules, markdown, tournament_report
from tunesmith.files import atomic_write_json, atomic_write_text, sha256_file
from tunesmith.inference.sample import GenerationSettings
from tunesmith.model.load import model_identity

KINDS: dict[str, Kind] = {"verdict": "verdict", "scores": "scores"}


@dataclass(frozen=True)
class Judging:
    """Who judges what: a local model, or with `base_url` a model behind an endpoint; nobody where `judge` is None."""

    judge: str | None = None
    base_url: str | None = None
    questions: Path | None = None
    references: Path | None = None
    contestants: Mapping[str, str] = field(default_factory=dict)
    kind: str = "verdict"
    turns: int = 1
    both_orders: bool = True
    parallel: int = 4
    max_tokens: int = 1024
    limit: int | None = None  # use only the first questions


def hold(
    paths: Sequence[Path],
    rules: Rules,
    judging: Judging,
    *,
    reference: str | None = None,
    out: Path | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Rate the systems by the judgments at `paths` and by those that are made now; see `tournament_report`.

    Raises ConfigError, DataError, JudgeError.
    """
    _check(judging, out)
    files = sort_out(paths, note)
    replies = read_replies(files["answers"])
    if out is not None and (judging.judge is not None or judging.contestants):
        questions = _questions(judging)
        replies |= _answers(judging, questions, out, note)
        if judging.judge is not None:
            judged = _judge(judging, questions, replies, out, reference, note)
            # Where OUT is among the paths too, its judgments have been read from there: all of them.
            others = [one for one in files["votes"] if Path(one.where).resolve() != Path(judged.where).resolve()]
            files["votes"] = [*others, judged]
    judgments, left_out = read_judgments(files["ratings"], files["votes"], replies)
    for line in left_out:
        note(line)
    report = tournament_report(judgments, rules, reference)
    report["notes"] = left_out + report["notes"]
    if out is not None:
        atomic_write_json(out / "report.json", report)
        atomic_write_text(out / "report.md", markdown(report) + "\n")
    return report


def _check(judging: Judging, out: Path | None) -> None:
    """Raise ConfigError where settings cannot act."""
    if judging.kind not in KINDS:
        raise ConfigError(f"--kind {judging.kind}: should be one of {', '.join(KINDS)}")
    works = judging.judge is not None or judging.contestants
    if works and (out is None or judging.questions is None):
        raise ConfigError("--judge and --contestant need --questions FILE, and --out FOLDER for what they say")
    if not works and judging.questions is not None:
        raise ConfigError("--questions: nobody is asked; give a --judge or a --contestant")
    if judging.base_url is not None and judging.judge is None:
        raise ConfigError("--base-url: say which model there is the --judge")


def _questions(judging: Judging) -> list[Question]:
    if judging.questions is None:
        raise ConfigError("--questions: missing")
    return read_questions(judging.questions, judging.references)[: judging.limit]


def _answers(
    judging: Judging, questions: Sequence[Question], out: Path, note: Callable[[str], None]
) -> dict[str, dict[str, Reply]]:
    """The contestants' answers; those to the same questions that OUT/answers holds are not asked for again."""
    return {
        name: _answers_of(name, target, judging, questions, out / "answers" / f"{name}.jsonl", note)
        for name, target in judging.contestants.items()
    }


def _answers_of(
    name: str, target: str, judging: Judging, questions: Sequence[Question], path: Path, note: Callable[[str], None]
) -> dict[str, Reply]:
    said = [_weights(target), judging.max_tokens, judging.turns, [(one.id, one.turns) for one in questions]]
    mark = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]
    if path.is_file():
        ((_, found),) = collect(path)
        if found.rows and all(row.get("asked") == mark for _, row in found.rows):
            note(f"{name}: its answers are there: {path}")
            return read_replies([found])[name]
    note(f"{name}: answering {len(questions):,} question{'s' * (len(questions) > 1)}")
    replies = answer_questions(_local(name, target, judging.max_tokens), questions, judging.turns)
    rows = [
        {"question_id": one.question, "model_id": name, "turns": one.turns, "asked": mark} for one in replies.values()
    ]
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return replies


def _weights(target: str) -> list[str]:
    """What a local model's name stands for: hashes of its adapter's files, or of a model's; a catalog's name alone."""
    folder = adapter_folder(Path(target))
    if folder is None:
        path = Path(target).expanduser()
        return [target, model_identity(path)["sha256"]] if path.exists() else [target]
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json"))
    return [target, *map(sha256_file, files)]


def _local(name: str, target: str, max_tokens: int) -> LocalModel:
    loaded = api.load(target)
    template, adapters = api.acting(loaded)
    settings = GenerationSettings(max_new_tokens=max_tokens)
    return LocalModel(name, loaded.model, loaded.tokenizer, template, adapters, settings)


def _judge(
    judging: Judging,
    questions: Sequence[Question],
    replies: dict[str, dict[str, Reply]],
    out: Path,
    reference: str | None,
    note: Callable[[str], None],
) -> Found:
    """Make the judgments that OUT/judgments.jsonl lacks, and give the file with those of the present games alone."""
    games = games_to_judge(
        questions,
        replies,
        kind=KINDS[judging.kind],
        turns=judging.turns,
        reference=reference if judging.kind == "scores" else None,
        both_orders=judging.both_orders,
    )
    path = out / "judgments.jsonl"
    weights = _weights(judging.judge or "") if judging.base_url is None else ()
    done = judge_games(games, _judge_of(judging), path, _progress(note), weights)
    note(f"{path}: {done.there:,} judgments were there, {done.judged:,} were made, {done.unparsed:,} of them unparsed")
    ((_, found),) = collect(path)
    rows = [(line, row) for line, row in found.rows if str(row["asked"]) in done.marks]
    if len(rows) < len(found.rows):
        note(
            f"{path}: left out {len(found.rows) - len(rows):,} judgments of other games: their answers, question or "
            "judge have changed, or they are not asked for now"
        )
    return replace(found, rows=rows)


def _judge_of(judging: Judging) -> Judge:
    name = judging.judge or ""
    if judging.base_url is None:
        return _local(Path(name).name, name, judging.max_tokens)
    key = os.environ.get("OPENAI_API_KEY")
    return Endpoint(name, judging.base_url, key, parallel=judging.parallel, max_tokens=judging.max_tokens)


def _progress(note: Callable[[str], None]) -> Callable[[int, int], None]:
    """A line for every tenth of the judgments."""

    def tell(done: int, of: int) -> None:
        if done * 10 // of > (done - 1) * 10 // of:
            note(f"judged {done:,} of {of:,}")

    return tell
