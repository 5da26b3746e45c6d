"""report.html of a run: curves, samples, memory, time; one file that opens from disk with no network."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.files import atomic_write_text
from tunesmith.train.log import read_metrics

WIDTH, HEIGHT, MARGIN = 640, 240, 44

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }} td, th {{ padding: .3rem .8rem; border-bottom: 1px solid #ddd;
text-align: left }} td.number {{ text-align: right; font-variant-numeric: tabular-nums }} svg {{ width: 100%; height:
auto }} pre {{ white-space: pre-wrap; background: #f5f5f5; padding: .6rem; overflow-wrap: anywhere }}
@media (prefers-color-scheme: dark) {{ body {{ background: #181818; color: #ddd }} pre {{ background: #252525 }} }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def write_report(
    folder: Path,
    *,
    samples: Sequence[Mapping[str, str]],
    before: Mapping[str, float],
    after: Mapping[str, float],
    facts: Mapping[str, Any],
) -> Path:
    """Write RUN/report.html from metrics.jsonl and what is given; returns its path. Raises DiskError.

    `before` and `after` are measures of the bare base and of the trained model by name; `samples` have prompt,
    expected, before and after; `facts` are shown as they are. All text is escaped: nothing that a model wrote can run.
    """
    path = folder / "report.html"
    atomic_write_text(path, page(folder, samples=samples, before=before, after=after, facts=facts))
    return path


def page(
    folder: Path,
    *,
    samples: Sequence[Mapping[str, str]] = (),
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> str:
    """The page as `write_report` writes it; of a run that goes on, the curves so far."""
    lines = read_metrics(folder / "metrics.jsonl")
    parts = [
        _table("Before and after", ("measure", "before", "after"), _measures(before or {}, after or {})),
        _table("The run", ("", ""), [(key, str(value)) for key, value in (facts or {}).items()]),
        _curve("Training loss", lines, "loss"),
        _curve("Held-out loss", lines, "eval_loss"),
        _curve("Tokens a second", lines, "tokens_per_second"),
        _samples(samples),
    ]
    return PAGE.format(title=html.escape(folder.name), body="\n".join(p for p in parts if p))


def _measures(before: Mapping[str, float], after: Mapping[str, float]) -> Iterable[tuple[str, str, str]]:
    for key in after:
        yield key, f"{before[key]:.4f}" if key in before else "-", f"{after[key]:.4f}"


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=number' if i else ''}>{html.escape(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    return f"<h2>{html.escape(title)}</h2><table><tr>{top}</tr>{body}</table>" if body else ""


def _curve(title: str, lines: Sequence[Mapping[str, Any]], key: str) -> str:
    """One line plot of `key` against the step, as SVG."""
    points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
    if len(points) < 2:
        return ""
    (first, last), values = (points[0][0], points[-1][0]), [value for _, value in points]
    low, high = min(values), max(values)
    across, up = (WIDTH - MARGIN) / max(last - first, 1), (HEIGHT - MARGIN) / ((high - low) or 1)
    path = " ".join(
        f"{MARGIN + (x - first) * across:.1f},{HEIGHT - MARGIN - (y - low) * up + 8:.1f}" for x, y in points
    )
    bottom = HEIGHT - MARGIN + 8
    return (
        f"<h2>{html.escape(title)}</h2>"
        f"<svg viewBox='0 0 {WIDTH + 8} {HEIGHT}' role='img' font-size='12' fill='currentColor'>"
        f"<title>{html.escape(title)}: from {values[0]:.4g} at step {first} to {values[-1]:.4g} at step {last}</title>"
        f"<path d='M{MARGIN},8 V{bottom} H{WIDTH}' fill='none' stroke='gray'/>"
        f"<text x='0' y='16'>{high:.4g}</text><text x='0' y='{bottom}'>{low:.4g}</text>"
        f"<text x='{MARGIN}' y='{bottom + 16}'>step {first}</text>"
        f"<text x='{WIDTH}' y='{bottom + 16}' text-anchor='end'>{last}</text>"
        f"<polyline points='{path}' fill='none' stroke='#2a7de1' stroke-width='2'/></svg>"
    )


def _samples(samples: Sequence[Mapping[str, str]]) -> str:
    if not samples:
        return ""
    parts = [
        f"<h3>{i}</h3>" + "".join(f"<b>{html.escape(key)}</b><pre>{html.escape(text)}</pre>" for key, text in s.items())
        for i, s in enumerate(samples, 1)
    ]
    return f"<h2>Samples</h2>{''.join(parts)}"
