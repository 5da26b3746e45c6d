"""The bench of seeing on a tiny model, a tiny encoder and drawn images: it runs, writes its page, and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from bench.children.seeing_regression import accuracy, fit
from bench.seeing import ROWS, SEES, unpack
from tests.tiny import write_base
from tests.vision.small import COLOURS, as_bytes, draw, write_encoder

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]


def archive(folder: Path, count: int = 8) -> Path:
    """A zip as that of CIFAR-10: train/CLASS/NUMBER.jpg."""
    file = folder / "cifar10" / "cifar10_train_jpg.zip"
    file.parent.mkdir(parents=True)
    with zipfile.ZipFile(file, "w") as target:
        for colour in COLOURS:
            for i in range(count):
                target.writestr(f"train/{colour}/{i:04d}.jpg", as_bytes(draw(colour, "disc", i), "JPEG"))
    return file


def test_images_are_parted_and_shuffled(tmp_path: Path) -> None:
    folder = unpack(archive(tmp_path), tmp_path / "work", 6, 2)
    names = {split: {p.relative_to(folder / split).as_posix() for p in (folder / split).rglob("*.jpg")} for split in (
        "images", "shuffled")}  # fmt: skip
    assert len(names["images"]) == 24 and "train/red/5.jpg" in names["images"] and "valid/red/7.jpg" in names["images"]
    held = {p.read_bytes() for p in (folder / "images" / "valid").rglob("*.jpg")}
    assert {p.read_bytes() for p in (folder / "shuffled" / "valid").rglob("*.jpg")} == held
    assert sum(n.startswith("valid/red/") for n in names["shuffled"]) == 2, "as many of each label as before"
    assert unpack(tmp_path / "gone.zip", tmp_path / "work", 6, 2) == folder, "made once"


def test_rows_say_what_sees() -> None:
    assert SEES == {"v1", "v1+lora", "v2", "tokens", "tokens+lora"} < set(ROWS)


def test_the_regression_is_scikit_learns() -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    draw_numbers = torch.Generator().manual_seed(0)
    x = torch.randn(120, 7, generator=draw_numbers, dtype=torch.float64)
    y = (x[:, :3] + 0.7 * torch.randn(120, 3, generator=draw_numbers, dtype=torch.float64)).argmax(1)
    weight = fit(x, y, 3, 0.1)
    theirs = sklearn.LogisticRegression(C=1 / (0.1 * 120 / 8), tol=1e-8, max_iter=1000).fit(x.numpy(), y.numpy())
    assert torch.allclose(weight[:, :-1], torch.from_numpy(theirs.coef_), atol=1e-3)
    assert abs(accuracy(weight, x, y) - theirs.score(x.numpy(), y.numpy())) < 0.01


def test_it_runs_and_goes_on(tmp_path: Path) -> None:
    archive(tmp_path)
    base = write_base(tmp_path / "base")
    encoder = write_encoder(tmp_path / "clip")
    words = ["--data-dir", tmp_path, "--model", base, "--encoder", encoder, "--learn", 6, "--ask", 2, "--epochs", 1]
    words += ["--threads", 1, "--work", tmp_path / "work", "--out", tmp_path / "out", "--rows", "v1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TUNESMITH_HOME": str(tmp_path / "home")}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "bench.seeing", *map(str, words), "--rate", "v1=0.02"],
            cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "v1" not in done.stderr, "what is finished is not made again"
    found = json.loads((tmp_path / "out" / "seeing.json").read_text())
    assert set(found["rows"]) == {"regression", "v1"} and not found["errors"]
    assert found["rows"]["regression"]["train"] == 18 and found["rows"]["regression"]["valid"] == 6
    assert all(0 <= found["rows"]["v1"][what] <= 1 for what in ("accuracy", "shuffled"))
    page = (tmp_path / "out" / "seeing.md").read_text()
    assert "logistic regression on the same features" in page and "`v1`: LLaMA-Adapter with images" in page
