"""Quantized folders: what bitsandbytes and transformers make of ours, what we make of theirs, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.laws.small import logits_of, sample_row
from tests.tiny import edit_json, write_base

from tunesmith.errors import ModelError
from tunesmith.export.gptq import Gptq
from tunesmith.export.quantize import calibrated, quantize_model
from tunesmith.files import MARKER
from tunesmith.model.load import load_model
from tunesmith.model.quantize import block_linears
from tunesmith.quant.storage import Spec

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base whose linears have whole blocks of 64."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return write_base(tmp_path_factory.mktemp("base"), **sizes)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change a quantized folder's tensors, as another tool might: without the hashes."""
    (folder / MARKER).unlink(missing_ok=True)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("kind", ["nf4", "fp4", "nf3", "nf2", "int4", "int8", "llm-int8"])
@pytest.mark.parametrize("double", [True, False])
def test_a_folder_loads_as_it_was_quantized(base: Path, tmp_path: Path, kind: str, double: bool) -> None:
    spec = Spec(kind, 64, double)
    report = quantize_model(base, tmp_path / "q", spec)
    written, live = load_model(tmp_path / "q"), load_model(base, quant=spec)
    for (name, one), (_, other) in zip(block_linears(written), block_linears(live), strict=True):
        assert type(one.quant) is type(other.quant) and torch.equal(one.weight, other.weight), name
    assert torch.equal(logits_of(written, *sample_row()), logits_of(live, *sample_row()))
    assert report["bits_per_weight"] == pytest.approx(spec.bits, abs=0.6) and report["dtype"] == "float32"


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_bitsandbytes_reads_ours(base: Path, tmp_path: Path, kind: str, double: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    quantize_model(base, tmp_path / "q", Spec(kind, 64, double))
    model = load_model(tmp_path / "q")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    for name, linear in block_linears(model):
        parts = {key: t for key, t in tensors.items() if key.startswith(f"{name}.weight.")}
        state = functional.QuantState.from_dict(parts, device="cpu")
        theirs = functional.dequantize_4bit(tensors[f"{name}.weight"], state)
        assert theirs.shape == (linear.out_features, linear.in_features)
        assert torch.equal(theirs, linear.dense_weight()), name


@pytest.mark.parametrize("double", [True, False])
def test_we_read_bitsandbytes(base: Path, tmp_path: Path, double: bool) -> None:
    """Every linear quantized and serialised by bitsandbytes' own functions, from bfloat16."""
    functional = pytest.importorskip("bitsandbytes.functional")
    quantize_model(base, tmp_path / "q", Spec("nf4", 64, double))
    dense, expected = load_file(base / "model.safetensors"), {}

    def theirs(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in dense if "_proj" in name]:
            for key in [key for key in tensors if key.startswith(f"{name}.")]:
                del tensors[key]
            packed, state = functional.quantize_4bit(
                dense[name].bfloat16(), quant_type="nf4", blocksize=64, compress_statistics=double
            )
            tensors[name] = packed
            tensors.update({f"{name}.{key}": t.clone() for key, t in state.as_dict(packed=True).items()})
            expected[name] = functional.dequantize_4bit(packed, state)

    edit(tmp_path / "q", theirs)
    for name, linear in block_linears(load_model(tmp_path / "q")):
        assert torch.equal(linear.dense_weight(torch.bfloat16), expected[f"{name}.weight"])


@pytest.mark.parametrize("kind", ["nf4", "llm-int8"])
def test_transformers_loads_ours(base: Path, tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    quantize_model(base, tmp_path / "q", Spec(kind))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    theirs.train(kind == "nf4")  # in evaluation bitsandbytes computes in bfloat16 where AVX-512 has it
    tokens, layout = sample_row()
    one = tokens[: layout.lengths[0]]
    with torch.no_grad():
        expected = theirs(one[None]).logits[0]
    found = logits_of(load_model(tmp_path / "q"), tokens, layout)[: len(one)]
    assert (found - expected).abs().max() < {"nf4": 1e-4, "llm-int8": 5e-2}[kind] * expected.abs().max()


def _state(tensors: dict[str, torch.Tensor], **changes: Any) -> None:
    name = next(key for key in tensors if key.startswith(f"{WEIGHT}.quant_state"))
    said = {**json.loads(bytes(tensors[name].tolist())), **changes}
    tensors[name] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def _set(name: str, index: int, value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors[f"{WEIGHT}{name}"].view(-1).__setitem__(index, value)


FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "absmax of NaN": (_set(".nested_absmax", 0, float("nan")), r"nested_absmax holds NaN or infinity"),
    "infinite offset": (lambda t: _state(t, nested_offset=float("inf")), r"quant_state\S+ cannot be read"),
    "absmax missing": (lambda t: t.pop(f"{WEIGHT}.absmax"), r"up_proj\.weight\.absmax is missing"),
    "absmax too short": (
        lambda t: t.update({f"{WEIGHT}.absmax": t[f"{WEIGHT}.absmax"][:-1].clone()}),
        r"absmax is uint8 \[127\], not uint8 \[128\]",
    ),
    "numbers too few": (lambda t: t.update({WEIGHT: t[WEIGHT][:-8].clone()}), r"up_proj\.weight is uint8 \[4088, 1\]"),
    "another code's map": (_set(".quant_map", 3, 0.5), r"quant_map is not the code nf4"),
    "unknown code": (lambda t: _state(t, quant_type="af4"), r"is of the code 'af4'; known: nf4, .*"),
    "block that does not divide": (
        lambda t: _state(t, blocksize=60),
        r"blocks of 60 do not divide its 128 x 64 weights",
    ),
    "shape of another model": (
        lambda t: _state(t, shape=[64, 128]),
        r"has shape \[64, 128\], the config says \[128, 64\]",
    ),
    "state that is no JSON": (
        lambda t: t.update(
            {next(k for k in t if k.startswith(f"{WEIGHT}.quant_state")): torch.zeros(9, dtype=torch.uint8)}
        ),
        r"quant_state\S+ cannot be read",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_one_line(base: Path, tmp_path: Path, fault: str) -> None:
    change, said = FAULTS[fault]
    quantize_model(base, tmp_path / "q", Spec("nf4"))
    edit(tmp_path / "q", change)
    with pytest.raises(ModelError, match=said) as caught:
        load_model(tmp_path / "q")
    assert "\n" not in str(caught.value)


def test_a_wrong_bit_is_found_by_its_hash(base: Path, tmp_path: Path) -> None:
    quantize_model(base, tmp_path / "q", Spec("nf4"))
    file = tmp_path / "q" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1000] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ModelError, match=r"model\.safetensors: its SHA-256 differs.*quantize again"):
        load_model(tmp_path / "q")


def test_what_is_no_scheme_of_ours_is_refused(base: Path, tmp_path: Path) -> None:
    quantize_model(base, tmp_path / "q", Spec("nf4"))
    (tmp_path / "q" / MARKER).unlink()
    edit_json(tmp_path / "q" / "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(ModelError, match=r"quant_method 'awq' is not supported; known: bitsandbytes, .*"):
        load_model(tmp_path / "q")
    with pytest.raises(ModelError, match="is quantized already"):
        edit_json(tmp_path / "q" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
        load_model(tmp_path / "q", quant=Spec("nf4"))


@pytest.mark.parametrize(("bits", "order"), [(4, []), (3, ["--act-order"])])
def test_gptq_by_the_command(base: Path, tmp_path: Path, command, bits: int, order: list[str]) -> None:
    (tmp_path / "t.txt").write_text("It was a joy from start to end, and I laughed and cried. " * 300)
    words = ["--method", "gptq", "--text", tmp_path / "t.txt", "--bits", bits, "--block-size", 32, *order, "--json"]
    code, out, err = command("quantize", base, "-o", tmp_path / "q", *words)
    assert code == 0, err
    group = 32 / 64 if order else 0  # which group a column is in, shared by 64 rows and more
    assert json.loads(out)["bits_per_weight"] == pytest.approx(bits + 24 / 32 + group, abs=0.1)
    live = calibrated(base, tmp_path / "t.txt", Gptq(bits, 32, bool(order)), 16)
    for name, linear in block_linears(load_model(tmp_path / "q")):
        packed, storage = live(f"{name}.weight", linear.weight)
        assert torch.equal(linear.dense_weight(), storage.dense(packed, torch.float32)), name
    edit(tmp_path / "q", lambda t: t[f"{WEIGHT}.scales"].view(-1).__setitem__(0, float("nan")))
    with pytest.raises(ModelError, match="scales holds NaN or infinity"):
        load_model(tmp_path / "q")


def test_gptq_needs_its_text(base: Path, tmp_path: Path, command) -> None:
    code, _, err = command("quantize", base, "-o", tmp_path / "q", "--method", "gptq")
    assert code == 2 and "--text is the calibration text of --method gptq" in err
    code, _, err = command("quantize", base, "-o", tmp_path / "q", "--method", "gptq", "-t", tmp_path / "none.txt")
    assert code == 2 and "none.txt: cannot be read as text" in err
    (tmp_path / "t.txt").write_text("short")
    code, _, err = command("quantize", base, "-o", tmp_path / "q", "--method", "gptq", "-t", tmp_path / "t.txt")
    assert code == 2 and "too short for one window" in err


def test_the_command(base: Path, tmp_path: Path, command) -> None:
    code, out, err = command("quantize", base, "-o", tmp_path / "q", "--kind", "nf4", "--json")
    assert code == 0, err
    assert json.loads(out)["bits_per_weight"] == pytest.approx(4.127, abs=0.02)
    code, _, err = command("quantize", base, "-o", tmp_path / "q")
    assert code == 2 and "is there already" in err
    code, _, err = command("quantize", tmp_path / "q", "-o", tmp_path / "again")
    assert code == 2 and "is quantized already; quantize the original" in err
    code, _, err = command("quantize", base, "-o", tmp_path / "b", "--kind", "nf5")
    assert code == 2 and "quant.kind: should be" in err
    code, _, err = command("quantize", base, "-o", tmp_path / "b", "--block-size", 48)
    assert code == 2 and "blocks of 48 do not divide" in err
