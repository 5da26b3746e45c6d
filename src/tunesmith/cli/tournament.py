"""`tunesmith tournament`: who wins, by judgments that are there or are made now."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.shell import app, command, note, out, out_json
from tunesmith.errors import ConfigError


@command(app, "tournament")
def tournament(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE|FOLDER]...", help="Judgments, votes and answers: .jsonl, .csv, .zip, folders."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="System whose scores are 100%; the table of scores needs it.")
    ] = None,
    games: Annotated[int, typer.Option("--games", help="Elo: games drawn for each ordering.")] = 500,
    orderings: Annotated[int, typer.Option("--orderings", help="Elo: random orderings to average over.")] = 10_000,
    k: Annotated[float, typer.Option("--k", help="Elo: most points that a game can move.")] = 32.0,
    start: Annotated[float, typer.Option("--start", help="Elo: everybody's first rating.")] = 1000.0,
    resamples: Annotated[int, typer.Option("--resamples", help="Bootstrap samples of each interval.")] = 1_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of orderings and samples.")] = 0,
    judge: Annotated[
        str | None, typer.Option("--judge", help="Who judges: a run or a model; with --base-url, a model there.")
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option("--base-url", help="OpenAI-compatible endpoint, such as http://localhost:8000/v1."),
    ] = None,
    questions: Annotated[
        Path | None, typer.Option("--questions", help="Questions, a row each: question_id, and text or turns.")
    ] = None,
    references: Annotated[
        Path | None, typer.Option("--references", help="Answers that the judge may trust, to some of the questions.")
    ] = None,
    contestant: Annotated[
        list[str] | None,
        typer.Option("--contestant", metavar="NAME=RUN|MODEL", help="Answers the questions itself; may be repeated."),
    ] = None,
    kind: Annotated[
        str, typer.Option("--kind", help="verdict: 1, 2 or tie; scores: 1 to 10 beside the reference.")
    ] = "verdict",
    turns: Annotated[int, typer.Option("--turns", help="1, or 2 for questions with a second turn.")] = 1,
    one_order: Annotated[bool, typer.Option("--one-order", help="Judge each pair in one order, not both.")] = False,
    parallel: Annotated[int, typer.Option("--parallel", min=1, help="Requests to the endpoint at once.")] = 4,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Longest answer of judge and contestants.")
    ] = 1024,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Use only the first questions.")] = None,
    destination: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for answers, judgments and the report.")
    ] = None,
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

    report = hold(
        paths or [],
        Rules(k=k, start=start, orderings=orderings, games=games, resamples=resamples, seed=seed),
        Judging(
            judge=judge, base_url=base_url, questions=questions, references=references, contestants=named, kind=kind,
            turns=turns, both_orders=not one_order, parallel=parallel, max_tokens=max_new_tokens, limit=rows,
        ),
        reference=reference,
        out=destination,
        note=note,
    )  # fmt: skip
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
