"""A run on a quantized base, whole: trained, saved, quantized again in a fresh process, and found equal bit for bit."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from tests.tiny import words

from tunesmith import api
from tunesmith.errors import VerificationError
from tunesmith.model.quantize import block_linears, resident_bits

pytestmark = pytest.mark.usefixtures("single_thread")
QUANT = {"kind": "nf4", "block_size": 32, "double_quant": True}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_base, tiny_reviews) -> tuple[Path, str]:
    """A finished run, and what it said. Do not change it."""
    from tunesmith.cli import main

    torch.set_num_threads(1)
    err, folder = io.StringIO(), tmp_path_factory.mktemp("quantized")
    given = words(tiny_base, tiny_reviews, folder, quant__kind="nf4", quant__block_size=32)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        assert main(["train", *given]) == 0, err.getvalue()
    return folder / "run", err.getvalue()


def test_a_fresh_process_quantizes_again_the_same_way(finished) -> None:
    checks = {c["name"]: c for c in json.loads((finished[0] / "verify.json").read_text())["checks"]}
    assert all(check["ok"] for check in checks.values())
    assert checks["live logits"]["detail"].endswith("places equal bit for bit")
    assert checks["base logits"]["detail"].endswith("places equal bit for bit")


def test_what_the_base_was_is_written_down(finished) -> None:
    identity = json.loads((finished[0] / "adapter" / "tunesmith.json").read_text())["base"]["identity"]
    assert identity["quant"] == QUANT
    assert "kind: nf4" in (finished[0] / "config.yaml").read_text()
    dense = api.load(finished[0], quant="none").model
    count = sum(p.numel() for p in dense.parameters())
    assert f"trainable of {count:,} parameters" in finished[1]


def test_it_comes_back_as_it_was_trained_and_on_the_dense_base_with_a_note(finished, caplog) -> None:
    loaded = api.load(finished[0])
    assert all(linear.quant is not None for _, linear in block_linears(loaded.model))
    assert resident_bits(loaded.model) < 6 and not caplog.records
    with caplog.at_level(logging.WARNING):
        dense = api.load(finished[0], quant="none")
    assert all(linear.quant is None for _, linear in block_linears(dense.model))
    assert "was trained on this base nf4; here it is not quantized, so logits differ a little" in caplog.text


def test_it_does_not_merge(finished, tmp_path) -> None:
    with pytest.raises(VerificationError, match="this merge is not what was trained, and was not kept"):
        api.merge(finished[0], out=tmp_path / "merged")


def test_verification_notices_a_base_held_otherwise(finished, tmp_path, command) -> None:
    """The check of bit equality above would fail if the fresh process did not quantize."""
    copy = shutil.copytree(finished[0], tmp_path / "run")
    file = copy / "adapter" / "tunesmith.json"
    said = json.loads(file.read_text())
    del said["base"]["identity"]["quant"]
    file.write_text(json.dumps(said))
    report = api.verify(copy)
    failed = {check["name"] for check in report["checks"] if not check["ok"]}
    assert failed >= {"base logits", "live logits"}


@pytest.mark.parametrize("quant", [{"kind": "nf5"}, {"kind": "nf4", "block_size": 7}, "nf4", {"code": "nf4"}])
def test_a_hostile_identity_is_one_line(finished, tmp_path, command, quant) -> None:
    copy = shutil.copytree(finished[0], tmp_path / "run")
    file = copy / "adapter" / "tunesmith.json"
    said = json.loads(file.read_text())
    said["base"]["identity"]["quant"] = quant
    file.write_text(json.dumps(said))
    code, _, err = command("generate", copy, "--prompt", "x")
    assert code == 2 and err.count("\n") == 1 and "quant" in err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant__kind": "nf4"}, "blocks of 64 do not divide its 12 x 24 weights; set quant.block_size=32"),
        ({"quant__kind": "nf4", "quant__block_size": 32, "adapter.kind": "full"}, "set quant.kind=none"),
    ],
)
def test_what_cannot_be_is_one_line(tiny_base, tiny_reviews, tmp_path, command, settings, said) -> None:
    given = words(tiny_base, tiny_reviews, tmp_path, **settings)
    given = [w for w in given if "full" not in str(settings) or not w.startswith("adapter.rank")]
    code, _, err = command("train", *given)
    assert code == 2 and said in err.splitlines()[-1]
