"""Runs in a folder, and what the page shows of one: its report, or its curves while it goes on."""

from __future__ import annotations

import html
from pathlib import Path

from tunesmith.compare.report import page
from tunesmith.errors import RequestError

BYTES = 8 << 20  # of a report that is shown
# A report says this of itself; what only looks like one is held to it too.
POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">"""


def runs(folder: Path) -> list[str]:
    """The names of the runs in a folder, the newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if (path / "metrics.jsonl").is_file() and not path.is_symlink()]
    return [path.name for path in sorted(found, key=lambda path: (path / "metrics.jsonl").stat().st_mtime)][::-1]


def shown(folder: Path, name: str | None) -> str:
    """A run's report, in a frame in which no script can run. Raises RequestError."""
    if not name:
        return f"<p>No runs in {html.escape(str(folder))} yet.</p>"
    if name not in runs(folder):
        raise RequestError(f"there is no run {name[:80]!r}; press Look again")
    report = folder / name / "report.html"
    if report.is_file():
        if report.stat().st_size > BYTES:
            raise RequestError(f"{report}: is larger than {BYTES} bytes; open it from disk")
        text = report.read_text(encoding="utf-8", errors="replace")
    else:
        text = page(folder / name)
    title = html.escape(f"report of {name}")
    return f'<iframe class="report" sandbox="" title="{title}" srcdoc="{html.escape(POLICY + text)}"></iframe>'
