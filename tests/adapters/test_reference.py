"""docs/methods.md is what the methods say of themselves, and each says something of every setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.adapters import find_method, kinds
from tunesmith.adapters.reference import reference

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"


def test_the_committed_page_is_up_to_date() -> None:
    said = PAGE.read_text(encoding="utf-8")
    assert said == reference(), "run: python -m tunesmith.adapters.reference > docs/methods.md"


@pytest.mark.parametrize("kind", kinds())
def test_every_method_says_where_it_comes_from_and_what_its_settings_are(kind: str) -> None:
    section = reference().split(f"\n## {kind}\n")[1].split("\n## ")[0]
    assert len(section.splitlines()[1]) > 20
    for name, field in find_method(kind).settings.__pydantic_fields__.items():
        assert f"`adapter.{name}`" in section and field.description.endswith("."), name
