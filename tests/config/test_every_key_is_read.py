"""A setting that nothing reads is a lie: each key of each section must be read somewhere outside config.

A key counts as read where its name is an attribute of something that bears its section's name or could:
`run.train.seed`, `train.seed`, `section.seed`, `settings.seed`; an attribute of a plain `self` does not count.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tunesmith.config import SECTIONS

SRC = Path(__file__).resolve().parents[2] / "src" / "tunesmith"

# Not wired yet. This list may only shrink: a key that is read must leave it, and the test below says so.
NOT_YET: set[str] = set()


def attribute_reads(folder: Path) -> set[tuple[str, str]]:
    """(name of what is read from, attribute) for each attribute read outside config."""
    reads = set()
    for path in folder.rglob("*.py"):
        if path.relative_to(folder).parts[0] == "config":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                name = (
                    owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
                )
                reads.add((name, node.attr))
    return reads


def is_read(section: str, field: str, reads: set[tuple[str, str]]) -> bool:
    owners = {section, f"{section}_section", f"_{section}", "section", "settings", "config", "options"}
    return any((owner, field) in reads for owner in owners)


KEYS = [f"{section}.{field}" for section, cls in SECTIONS.items() for field in cls.__dataclass_fields__]


def test_every_key_is_read_or_listed_as_not_wired_yet():
    reads = attribute_reads(SRC)
    unread = {key for key in KEYS if not is_read(*key.split("."), reads)}
    assert unread - NOT_YET == set(), "read by nothing: wire them, or take them out of sections.py"
    assert NOT_YET - unread == set(), "these are read by now: take them out of NOT_YET"


@pytest.mark.parametrize(
    ("code", "read"),
    [
        ("run.train.seed", True),
        ("train.seed", True),
        ("self.seed", False),
        ("run.data.seed", False),
        ("x.seed = 1", False),
    ],
)
def test_the_check_bites(tmp_path, code, read):
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "a.py").write_text(code)
    assert is_read("train", "seed", attribute_reads(tmp_path)) is read
