"""docs/configuration.md is what the types say, and the types say something about every key."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.config import SECTIONS, Run
from tunesmith.config.reference import reference

ROOT = Path(__file__).resolve().parents[2]


def test_the_committed_reference_is_up_to_date():
    committed = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert committed == reference(), "run: python -m tunesmith.config.reference > docs/configuration.md"


@pytest.mark.parametrize("cls", [*SECTIONS.values(), Run], ids=lambda cls: cls.__name__)
def test_every_key_is_described(cls):
    for name, field in cls.__pydantic_fields__.items():
        assert field.description and field.description.endswith("."), f"{cls.__name__}.{name}"
        if name not in SECTIONS:
            assert f"{name}`" in reference()


def test_the_example_in_the_reference_is_a_valid_run(tmp_path):
    from tunesmith.config import load_run

    block = reference().split("An example:\n\n")[1].split("\n## ")[0]
    path = tmp_path / "config.yaml"
    path.write_text("\n".join(line[4:] for line in block.splitlines()), encoding="utf-8")
    run, _ = load_run(path)
    assert run.adapter["rank"] == 16
    assert run.evaluate.best == "accuracy"
