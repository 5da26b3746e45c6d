"""Several adapters on one model, as docs/several-adapters.md has them: named, together, switched, by prompt, a bank."""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path

import pytest
from tests.laws.small import disturb
from tests.tiny import run_it

from tunesmith import api, inference
from tunesmith.inference.session import ChatSession

PAGE = Path(__file__).parents[1] / "docs" / "several-adapters.md"
PARTS = [{"kind": "prefix", "virtual_tokens": 3}, {"kind": "lora", "rank": 2}]
pytestmark = pytest.mark.usefixtures("single_thread", "in_process")


@pytest.fixture
def runs(command, tiny_base, tiny_reviews, tmp_path, monkeypatch) -> Path:
    """runs/formal (prefix and LoRA in one) and runs/short (LoRA), and adapters/ with three of LoRA."""
    out = tmp_path / "runs"
    more = {"train__epochs": 2, "train__learning_rate": 0.02}
    run_it(
        command, tiny_base, tiny_reviews, out, name="formal", adapter__rank=None, adapter__kind="mixed",
        adapter__parts=PARTS, **more,
    )  # fmt: skip
    run_it(command, tiny_base, tiny_reviews, out, name="short", train__seed=1, **more)
    for name in ("a", "b", "c"):
        shutil.copytree(out / "short" / "adapter", tmp_path / "adapters" / name)
    monkeypatch.chdir(tmp_path)
    return out


def test_the_page_runs(runs, tiny_base, tmp_path, capsys) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    assert len(blocks) == 3
    for number, block in enumerate(blocks):
        file = tmp_path / f"block{number}.py"
        file.write_text(block.replace('"smollm2-135m-instruct"', repr(str(tiny_base))), encoding="utf-8")
        space = runpy.run_path(str(file))
    assert space["bank"].members == ["b", "c"] and len({a.ids for a in space["answers"]}) == 1


def test_named_together_switched_and_by_prompt(runs, tiny_base) -> None:
    loaded = api.load(tiny_base, adapter={"formal": runs / "formal", "short": runs / "short"})
    for number, adapter in enumerate(loaded.adapters.values()):
        disturb(adapter, seed=number, std=0.5)  # so far that each answers otherwise
    settings = inference.GenerationSettings(max_new_tokens=8)
    prompt = loaded.tokenizer.encode("a joy from start to end")
    routes = [("formal",), ("short",), (), ("formal", "short")]
    eos = loaded.tokenizer.eos_ids

    def alone(names: tuple[str, ...]) -> tuple[int, ...]:
        return inference.generate(loaded.model, [prompt], settings, eos_ids=eos, adapters=names)[0].ids

    mixed = [a.ids for a in inference.generate(loaded.model, [prompt] * 4, settings, eos_ids=eos, routes=routes)]
    assert mixed == [alone(names) for names in routes] and len(set(mixed)) == 4
    together = inference.generate(loaded.model, [prompt], settings, eos_ids=eos)[0].ids
    assert together == mixed[3], "without a choice, all attached ones act"
    template = loaded.templates["short"]
    session = ChatSession(loaded.model, loaded.tokenizer, template, settings, templates=loaded.templates, adapters=())
    said = {}
    for name in (None, "formal", "short", None, "formal"):
        session.use(name)
        session.reset()
        said.setdefault(name, set()).add("".join(session.say("a joy")))
    assert all(len(texts) == 1 for texts in said.values()), "switching leaves nothing behind"
