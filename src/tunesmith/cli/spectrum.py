"""`tunesmith spectrum`: what training did to the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.methods import MethodFiles, open_files
from tunesmith.cli.shell import app, command, out, out_json

# what a line shows: heading, key, form
_COLUMNS = (
    ("|D|/|W|", "relative", "10.4f"),
    ("rank", "rank", "9.1f"),
    ("rank90", "rank90", "9.1f"),
    ("eff. rank", "effective_rank", "10.1f"),
    ("amplif.", "amplification", "9.2f"),
    ("shift", "shift", "9.4f"),
)


@command(app, "spectrum")
def spectrum(
    target: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="What was trained.")],
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="RUN|ADAPTER", help="Compare directions with another one, of any rank."),
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Hold each change against the weight that it changes (slower).")
    ] = False,
    base: Annotated[
        str | None, typer.Option("--base", help="Base model; without it, the one the adapter names.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything, weight by weight, as JSON.")] = False,
    method_file: MethodFiles = None,
) -> None:
    """Say how large and of what rank the change of each weight is, layer by layer, for any method that changes weights.

    \b
    tunesmith spectrum runs/NAME
    tunesmith spectrum runs/rank8 --against runs/rank64
    """
    open_files(method_file)
    from tunesmith.spectra import spectrum as look

    report = look(target, base=base, against=against, weights=weights)
    if json:
        out_json(report)
    else:
        show_spectrum(report)


def show_spectrum(report: Mapping[str, Any]) -> None:
    """Print means over layers and kinds of modules, and the similarity of two runs' directions."""
    columns = [column for column in _COLUMNS if any(column[1] in row for row in report["layers"])]
    for key in ("layer", "module"):
        out(f"{key:<16}{'weights':>8}" + "".join(f"{name:>{_width(form)}}" for name, _, form in columns))
        for row in report[f"{key}s"]:
            cells = (
                f"{row[name]:{form}}" if name in row else " " * (_width(form) - 1) + "-" for _, name, form in columns
            )
            out(f"{'-' if row[key] is None else row[key]!s:<16}{row['weights']:>8}" + "".join(cells))
    if "similarity" in report:
        _show_similarity(report["similarity"], report["against"])


def _show_similarity(found: Mapping[str, Any], against: str) -> None:
    """A table of phi(i, j), i down and j across, with what random directions would give in brackets."""
    mean = found["mean"]
    rows, columns = ({int(key.split(",")[part]): None for key in mean["phi"]} for part in (0, 1))
    out(f"phi(i, j) of the directions of {found['directions_of']}, mean of {len(found['weights'])} weights (at random)")
    out(f"{'i here, j there':<16}" + "".join(f"{j:>16}" for j in sorted(columns)))
    for i in sorted(rows):
        cells = (f"{mean['phi'][f'{i},{j}']:.3f} ({mean['at_random'][f'{i},{j}']:.3f})" for j in sorted(columns))
        out(f"{i:<16}" + "".join(f"{cell:>16}" for cell in cells))
    out(f"against {against}")


def _width(form: str) -> int:
    return int(form.split(".")[0])
