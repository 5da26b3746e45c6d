"""`tunesmith tournament`: who wins, by judgments that are there or are made now."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.shell import app, command, note, out, out_json
from tunesmith.errors import ConfigError

Paths = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[FILE|FOLDER]...", help="Judgments, votes and answers: .jsonl, .csv, .zip, folders."),
]
Reference = Annotated[
    str | None, typer.Option("--reference", help="System whose scores are 100%; the table of scores needs it.")
]
Games = Annotated[int, typer.Option("--games", help="Elo: games drawn for each ordering.")]
Orderings = Annotated[int, typer.Option("--orderings", help="Elo: random orderings to average over.")]
K = Annotated[float, typer.Option("--k", help="Elo: most points that a game can move.")]
Start = Annotated[float, typer.Option("--start", help="Elo: everybody's first rating.")]
Resamples = Annotated[int, typer.Option("--resamples", help="Bootstrap samples of each interval.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of orderings and samples.")]
JudgeName = Annotated[
    str | None, typer.Option("--judge", help="Who judges: a run or a model; with --base-url, a model there.")
]
BaseUrl = Annotated[
    str | None, typer.Option("--base-url", help="OpenAI-compatible endpoint, such as http://localhost:8000/v1.")
]
Questions = Annotated[
    Path | None, typer.Option("--questions", help="Questions, a row each: question_id, and text or turns.")
]
References = Annotated[
    Path | None, typer.Option("--references", help="Answers that the judge may trust, to some of the questions.")
]
Contestants = Annotated[
    list[str] | None,
    typer.Option("--contestant", metavar="NAME=RUN|MODEL", help="Answers the questions itself; may be repeated."),
]
KindName = Annotated[str, typer.Option("--kind", help="verdict: 1, 2 or tie; scores: 1 to 10 beside the reference.")]
Turns = Annotated[int, typer.Option("--turns", help="1, or 2 for questions with a second turn.")]
OneOrder = Annotated[bool, typer.Option("--one-order", help="Judge each pair in one order, not both.")]
Parallel = Annotated[int, typer.Option("--parallel", min=1, help="Requests to the endpoint at once.")]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Longest answer of judge and contestants.")
]  # fmt: skip
Rows = Annotated[int | None, typer.Option("--rows", min=1, help="Use only the first questions.")]
Destination = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder for answers, judgments and the report.")
]  # fmt: skip


@command(app, "tournament")
def tournament(
    paths: Paths = None,
    reference: Reference = None,
    games: Games = 500,
    orderings: Orderings = 10_000,
    k: K = 32.0,
    start: Start = 1000.0,
    resamples: Resamples = 1_000,
    seed: Seed = 0,
    judge: JudgeName = None,
    base_url: BaseUrl = None,
    questions: Questions = None,
    references: References = None,
    contestant: Contestants = None,
    kind: KindName = "verdict",
    turns: Turns = 1,
    one_order: OneOrder = False,
    parallel: Parallel = 4,
    max_new_tokens: MaxNewTokens = 1024,
    rows: Rows = None,
    destination: Destination = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Rate systems by pairs of their answers: Elo, Bradley-Terry, % of a reference, position bias.

    \b
    tunesmith tournament ratings.zip answers.zip --reference gpt-3.5-turbo
    tunesmith tournament votes.csv
    tunesmith tournament --questions q.jsonl --contestant a=runs/A --contestant b=runs/B --judge M --base-url URL -o out
    """
    if not paths and judge is None:
        raise ConfigError("nothing to count: give files of judgments or votes, or a --judge and --questions")
    named = read_contestants(contestant or [])
    from tunesmith.evaluate.tournament.report import Rules, markdown
    from tunesmith.tournament import Judging, hold

    rules = Rules(k=k, start=start, orderings=orderings, games=games, resamples=resamples, seed=seed)
    judging = Judging(
        judge=judge, base_url=base_url, questions=questions, references=references, contestants=named, kind=kind,
        turns=turns, both_orders=not one_order, parallel=parallel, max_tokens=max_new_tokens, limit=rows,
    )  # fmt: skip
    report = hold(paths or [], rules, judging, reference=reference, out=destination, note=note)
    if json:
        out_json(report)
    else:
        out(markdown(report))


def read_contestants(words: list[str]) -> dict[str, str]:
    """Return what each contestant is, from words NAME=RUN|MODEL. Raises ConfigError."""
    named: dict[str, str] = {}
    for word in words:
        name, equals, target = word.partition("=")
        if not equals or not name or not target or "/" in name or name.startswith("."):
            raise ConfigError(f"--contestant {word}: write a name and what it stands for as NAME=RUN, such as a=runs/A")
        if name in named:
            raise ConfigError(f"--contestant {word}: the name {name!r} is taken")
        named[name] = target
    return named
