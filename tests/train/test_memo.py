"""What a step holds is counted once: for the same work, and for no other; whatever is wrong with the disk."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.laws.small import TINY, examples, packs_of

from tunesmith.adapters import attach
from tunesmith.data.pack import Pack
from tunesmith.model.llama import Llama
from tunesmith.train import memo as module
from tunesmith.train.memo import Memo
from tunesmith.train.simulate import StepBytes

ONE, OTHER = StepBytes(1, 2, 3, 4, True), StepBytes(5, 6, 7)


def work(root: Path, rank: int = 2, **settings: object) -> tuple[Memo, Pack]:
    with torch.device("meta"):
        model = Llama(TINY)
    model.requires_grad_(False)
    attach(model, {"kind": "lora", "rank": rank})
    return Memo(model, settings, root=root), packs_of(model, examples(), device="meta")[0]


def ask(memo: Memo, pack: Pack, answer: StepBytes, recompute: bool = False) -> StepBytes:
    return memo.step(pack, recompute, count=lambda: answer)


def test_the_same_work_is_counted_once(tmp_path: Path) -> None:
    assert ask(*work(tmp_path / "plans"), ONE) == ONE
    assert ask(*work(tmp_path / "plans"), OTHER) == ONE  # not counted again


def test_other_work_is_counted_anew(tmp_path: Path) -> None:
    memo, pack = work(tmp_path)
    assert ask(memo, pack, ONE) == ONE
    assert ask(memo, pack, OTHER, recompute=True) == OTHER
    assert ask(*work(tmp_path, rank=3), OTHER) == OTHER
    assert ask(*work(tmp_path, dropout=0.1), OTHER) == OTHER
    shorter = packs_of(Llama(TINY), examples()[:2], device="meta")[0]
    assert ask(memo, shorter, OTHER) == OTHER and ask(memo, pack, OTHER) == ONE
    fewer = replace(pack, read=pack.read[:-1])  # the last block runs for one position less, with as many targets
    assert ask(memo, fewer, OTHER) == OTHER


def test_another_source_leaves_nothing_of_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(*work(tmp_path / "plans"), ONE)
    monkeypatch.setattr(module, "_stamp", lambda: "another")
    assert ask(*work(tmp_path / "plans"), OTHER) == OTHER
    assert [path.name for path in (tmp_path / "plans").iterdir()] == ["another"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kept": 1}', '{"kept": "a", "loss": 1, "peak": 1, "end": 1}'])
def test_a_damaged_file_is_counted_again(tmp_path: Path, text: str) -> None:
    ask(*work(tmp_path), ONE)
    (path,) = tmp_path.rglob("*.json")
    path.write_text(text)
    assert ask(*work(tmp_path), OTHER) == OTHER == ask(*work(tmp_path), ONE)


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "plans").write_text("a file")
    assert ask(*work(tmp_path / "plans"), ONE) == ONE


TWICE = """
import sys
from tunesmith.cli import main
sys.argv = ["tunesmith", "train", *sys.argv[1:]]
try:
    main()
finally:
    print("compiler:", "torch._dynamo" in sys.modules)
"""


def test_a_second_start_does_not_import_torchs_compiler(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    words = [f"model={tiny_base}", f"data={tmp_path / 'rows.jsonl'}", "data.template=plain", "adapter=lora"]
    words += ["train.batch_size=4", "evaluate.samples=0"]
    said = []
    for name in ("first", "second"):
        command = [sys.executable, "-c", TWICE, *words, f"output_dir={tmp_path / name}"]
        env = {**os.environ, "TUNESMITH_HOME": str(tmp_path / "home")}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        assert "memory: planned" in done.stderr + done.stdout, done.stderr
        said.append(done.stdout.strip().splitlines()[-1])
    assert said == ["compiler: True", "compiler: False"]
