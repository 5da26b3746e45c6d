"""`tunesmith export`: each format written, read back by the other project's reader, and refused where it must be."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.data.conftest import SMOLLM2, write_folder
from tests.export.small_run import VOCAB, logits, make_base, make_run, train_like

from tunesmith.adapters.peft_format import load_adapter, read_info
from tunesmith.data.templates import from_dict
from tunesmith.errors import CannotExchange, CannotMerge, ConfigError, ModelError, VerificationError
from tunesmith.export import formats, readback, vllm
from tunesmith.export.formats import FORMATS, Options, export_subject
from tunesmith.export.hf import write_model
from tunesmith.export.subject import Subject
from tunesmith.model.load import load_model, model_identity
from tunesmith.tokenizer import load_tokenizer

TOKENS = torch.arange(5, 60) * 7 % VOCAB
QUIET = Options(read_back=False)
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None,
    reason="NOT TESTED: what llama.cpp reads; install xllamacpp (in the extra test)",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_base(tmp_path_factory.mktemp("base") / "base")
    write_folder(folder, eos="<|im_end|>", chat_template=SMOLLM2)
    sampling = {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "trust_remote_code": True, "top_k": "many"}
    (folder / "generation_config.json").write_text(json.dumps({**sampling, "eos_token_id": 2}))
    return folder


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "run", base, by=0.1)


def subject(base: Path, run: Path | None = None, **loading: Any) -> Subject:
    """As api._subject makes it."""
    model, tokenizer = load_model(base, **loading), load_tokenizer(base)
    whole = Subject(model, tokenizer, str(base), base, model_identity(base, loading.get("quant")))
    if run is None:
        return whole
    info = read_info(run / "adapter")
    template = from_dict(info.template, tokenizer) if info.template else None
    return replace(whole, adapter=load_adapter(info.folder, model), info=info, template=template)


def theirs(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(TOKENS[None]).logits[0]


def agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


def test_a_folder_is_read_back_by_transformers(base: Path, run: Path, tmp_path: Path) -> None:
    """Once with the reader's own process; the other tests ask transformers here."""
    made = export_subject(subject(base, run), "hf", tmp_path / "out", Options())
    assert made["not_read_back"] == [] and len(made["read_back"]) == 3
    assert all(
        what in said
        for what, said in zip(("logits at 17", "the ids of", "chat's prompt"), made["read_back"], strict=True)
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert said.endswith("### Instruction:\nhi\n\n### Response:\n")  # the template of training, not the base's
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.temperature, generation.top_p, generation.eos_token_id) == (0.2, 0.9, [2])
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert "trust_remote_code" not in kept and "top_k" not in kept


@pytest.mark.parametrize("kind", ["F32", "bfloat16", None])
def test_a_model_without_an_adapter(kind: str | None, base: Path, tmp_path: Path) -> None:
    made = export_subject(subject(base), "hf", tmp_path / "out", replace(QUIET, type=kind))
    assert made["merged_layers"] == 0 and not (tmp_path / "out" / "merge.json").exists()
    assert agree(theirs(tmp_path / "out"), theirs(base)) == (kind != "bfloat16")
    with pytest.raises(ConfigError, match="'F99' is not known"):
        export_subject(subject(base), "hf", tmp_path / "other", replace(QUIET, type="F99"))


def test_large_weights_lie_in_several_files(base: Path, run: Path, tmp_path: Path) -> None:
    live = subject(base, run)
    made = export_subject(live, "hf", tmp_path / "out", replace(QUIET, shard=60_000))
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {name: file for file in files for name in safe_open(tmp_path / "out" / file, "pt").keys()}
    assert index["weight_map"] == held
    assert agree(theirs(tmp_path / "out"), logits(live.model, TOKENS)) and made["top1_agreement"] == 1


def test_a_peft_folder_is_read_back_by_peft(base: Path, run: Path, tmp_path: Path) -> None:
    live = subject(base, run)
    made = export_subject(live, "peft", tmp_path / "out", Options())
    assert made["not_read_back"] == [] and "peft" in made["read_back"][0]
    own = load_file(run / "adapter" / "adapter_model.safetensors")
    out = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert own.keys() == out.keys() and all(torch.equal(own[key], out[key]) for key in own)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_gguf_file_is_read_back_by_llama_cpp(kind: str, base: Path, run: Path, tmp_path: Path) -> None:
    made = export_subject(subject(base, run), "gguf", tmp_path / "m.gguf", Options(type=kind))
    said = " | ".join(made["read_back"])
    assert "each as written" in said and "texts equal" in said and "a chat's prompt has the same ids" in said
    assert made["kl"] < 1e-3 < made["kl_base"] and made["least_survived"] > 0.99
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@needs_llama_cpp
def test_an_adapter_file_is_read_back_by_llama_cpp(base: Path, run: Path, tmp_path: Path) -> None:
    made = export_subject(subject(base, run), "gguf-lora", tmp_path / "lora.gguf", Options())
    assert made["pairs"] == 14
    assert "without the adapter: 100.0%" in made["read_back"][0] and "with the adapter: 100.0%" in made["read_back"][1]


def test_what_was_not_read_is_said(base: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readback.importlib.util, "find_spec", lambda name: None)
    made = export_subject(subject(base, run), "gguf", tmp_path / "m.gguf", Options(type="F32"))
    assert made["not_read_back"] == ["not read back with llama.cpp: xllamacpp is not installed"]
    made = export_subject(subject(base, run), "gguf", tmp_path / "n.gguf", Options(type="F32", read_back=False))
    assert made["not_read_back"] == ["not read back: --no-read-back"]


@needs_llama_cpp
def test_what_reads_otherwise_is_not_kept(
    base: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model's answers, and a tokenizer that llama.cpp would cut otherwise."""
    other = readback.forced
    monkeypatch.setattr(readback, "forced", lambda *args: other(*args).flip(0))
    with pytest.raises(VerificationError, match=r"reads otherwise elsewhere: llama.cpp: .* greedy tokens equal"):
        export_subject(subject(base, run), "gguf", tmp_path / "m.gguf", Options(type="F32"))
    monkeypatch.undo()
    fields = formats.tokenizer_fields
    monkeypatch.setattr(
        formats, "tokenizer_fields", lambda *args: ({**fields(*args)[0], "tokenizer.ggml.pre": "smollm"}, [])
    )
    with pytest.raises(VerificationError, match=r"llama.cpp gives other ids for \d+ of 12 texts"):
        export_subject(subject(base, run), "gguf", tmp_path / "m.gguf", Options(type="F32"))
    assert not list(tmp_path.iterdir())


def test_other_logits_ids_and_prompts_are_seen(base: Path) -> None:
    """The comparisons by themselves: one logit 2e-5 off, one id, one token of the prompt."""
    tokenizer, ours = load_tokenizer(base), torch.randn(4, 9)
    template = formats._own_template(subject(base))
    ids = [tokenizer.encode(text, special=True) for text in formats.TEXTS]
    prompt = formats.readback.encode_prompt(formats.readback.chat_row(formats.CHAT, "x"), template, tokenizer)
    right = {"version": "1", "ids_True": ids, "chat_ids": prompt}
    for change, logits_off, failed in (
        ({}, 0.0, ""),
        ({}, 2e-5, "where 1e-05 is allowed"),
        ({"ids_True": [[0], *ids[1:]]}, 0.0, "gives other ids for 1 of 12 texts"),
        ({"chat_ids": prompt[:-1]}, 0.0, "prompts a chat with other ids"),
    ):
        checks = readback.Checks()
        got = readback.Read({**right, **change}, ours + logits_off * ours.abs().max() * torch.eye(4, 9))
        readback.compare_logits(checks, "transformers", got, ours)
        readback.compare_ids(checks, "transformers", got, tokenizer, template)
        assert len(checks.failed) == bool(failed) and failed in "".join(checks.failed)


def test_a_lossy_gguf_is_refused(base: Path, tmp_path: Path) -> None:
    """A delta that four bits cannot carry: the answers are nearer to the base's than to those that were trained."""
    live = subject(base, make_run(tmp_path / "run", base, by=0.01))
    with pytest.raises(VerificationError, match=r"its answers moved by KL .*--type F32") as error:
        export_subject(live, "gguf", tmp_path / "m.gguf", replace(QUIET, type="Q4_0"))
    assert error.value.exit_code == 4 and not (tmp_path / "m.gguf").exists()
    made = export_subject(live, "gguf", tmp_path / "m.gguf", replace(QUIET, type="Q4_0", force=True))
    assert made["kl"] > 0.5 * made["kl_base"]


def test_ollama(base: Path, run: Path, tmp_path: Path) -> None:
    made = export_subject(subject(base, run), "ollama", tmp_path / "out", replace(QUIET, type="F16"))
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{ if .System }}') and "PARAMETER temperature 0.2" in text
    assert made["run_by_ollama"] is False and load_model(tmp_path / "out" / "model.gguf")


def test_vllm_holds_several_adapters_of_one_base(base: Path, run: Path, tmp_path: Path) -> None:
    """PEFT loads each with the logits of base + adapter, ranks and scales of their own made one."""
    ranks = make_run(
        tmp_path / "r", base, rank=4, rank_pattern={"v_proj": 2}, alpha_pattern={"up_proj": 3.0}, rslora=True
    )
    out = tmp_path / "out"
    export_subject(subject(base, run), "vllm", out, replace(QUIET, name="a"))
    made = export_subject(subject(base, ranks), "vllm", out, replace(QUIET, name="b"))
    assert made["adapters"] == ["a", "b"] and made["run_by_vllm"] is False
    script = (out / "serve.sh").read_text()
    assert "--max-lora-rank 8 --max-loras 2" in script and 'a="$here/adapters/a" b="$here/adapters/b"' in script
    for name, folder in (("a", run), ("b", ranks)):
        assert vllm.faults(out / "adapters" / name) == []
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            found = peft.PeftModel.from_pretrained(model, out / "adapters" / name).eval()(TOKENS[None]).logits[0]
        assert agree(found, logits(subject(base, folder).model, TOKENS))
    own = load_file(run / "adapter" / "adapter_model.safetensors")
    same = load_file(out / "adapters" / "a" / "adapter_model.safetensors")
    assert all(torch.equal(own[key], same[key]) for key in own)  # one rank, one scale: not a bit changed
    other = make_base(tmp_path / "other", hidden_size=64)
    with pytest.raises(ConfigError, match="is for the base"):
        export_subject(subject(other, make_run(tmp_path / "o", other)), "vllm", out, replace(QUIET, name="c"))
    with pytest.raises(ConfigError, match="is there already"):
        export_subject(subject(base, run), "vllm", out, replace(QUIET, name="a"))
    with pytest.raises(ConfigError, match="--name: '../x'"):
        export_subject(subject(base, run), "vllm", out, replace(QUIET, name="../x"))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"use_dora": True}, "use_dora is set"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"r": 3}, "has another rank than r=3"),
        ({"r": 1024}, "at most 512"),
        ({"peft_type": "IA3"}, "only LORA is served"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is set"),
        ({"lora_alpha": None}, "lora_alpha is missing"),
    ],
)
def test_vllms_rules_bite(change: dict[str, Any], fault: str, base: Path, run: Path, tmp_path: Path) -> None:
    export_subject(subject(base, run), "vllm", tmp_path / "out", replace(QUIET, name="a"))
    folder = tmp_path / "out" / "adapters" / "a"
    config = {**json.loads((folder / "adapter_config.json").read_text()), **change}
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    assert any(fault in found for found in vllm.faults(folder))


def test_vllms_rules_on_tensors(base: Path, run: Path, tmp_path: Path) -> None:
    export_subject(subject(base, run), "vllm", tmp_path / "out", replace(QUIET, name="a"))
    folder = tmp_path / "out" / "adapters" / "a"
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    save_file(
        {**{k: v for k, v in tensors.items() if k != first}, "base_model.model.lm_head.lora_A.weight": tensors[first]},
        file,
    )
    found = " ".join(vllm.faults(folder))
    assert "lm_head.lora_A.weight is not the A or B" in found and "has no counterpart" in found


REFUSED: dict[str, tuple[dict[str, Any], str, type[Exception], str]] = {
    "dora": ({"kind": "dora", "rank": 2}, "gguf-lora", CannotExchange, "dora on .* is not plain LoRA.*--to gguf"),
    "norms": (
        {"kind": "lora", "rank": 2, "train_norms": True},
        "vllm",
        CannotExchange,
        r"norm.weight whole \(5 weights",
    ),
    "prefix": ({"kind": "prefix", "virtual_tokens": 2}, "gguf", CannotMerge, "keep the adapter beside its base"),
    "reft": ({"kind": "reft"}, "peft", CannotExchange, "PEFT has no such method"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_format_cannot_say_is_refused(name: str, base: Path, tmp_path: Path) -> None:
    spec, to, error, line = REFUSED[name]
    live = subject(base)
    live = replace(live, adapter=train_like(live.model, spec))
    with pytest.raises(error, match=line):
        export_subject(live, to, tmp_path / "out", replace(QUIET, name="a"))
    assert not list(tmp_path.glob("*"))


def test_tied_embeddings_with_a_lora_on_the_head(tmp_path: Path) -> None:
    """llama.cpp has one weight for both: apart is a merge, not a LoRA file."""
    tied = make_base(tmp_path / "tied", tie_word_embeddings=True)
    live = subject(tied)
    live = replace(
        live, adapter=train_like(live.model, {"kind": "lora", "rank": 2, "target_modules": ["lm_head"]}, 0.2)
    )
    with pytest.raises(CannotExchange, match="lm_head is tied"):
        export_subject(live, "gguf-lora", tmp_path / "lora.gguf", QUIET)
    export_subject(live, "gguf", tmp_path / "m.gguf", replace(QUIET, type="F32"))
    again = load_model(tmp_path / "m.gguf")
    assert not again.config.tie_word_embeddings and agree(logits(again, TOKENS), logits(live.model, TOKENS))


@pytest.mark.parametrize("to", FORMATS)
def test_nothing_is_overwritten_unasked(to: str, base: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    (tmp_path / "model.gguf").write_text("a model")
    out = tmp_path / ("model.gguf" if to.startswith("gguf") else "out")
    with pytest.raises(ConfigError, match="is there already|holds something else"):
        export_subject(subject(base, run), to, out, replace(QUIET, name="a"))
    if to not in ("gguf", "gguf-lora", "vllm"):
        with pytest.raises(ConfigError, match="was not written by tunesmith"):
            export_subject(subject(base, run), to, out, replace(QUIET, force=True))
    assert (tmp_path / "out" / "thesis.tex").exists()
    with pytest.raises(ConfigError, match="is what is to be exported"):
        export_subject(subject(base, run), to, base, replace(QUIET, force=True))


def test_wrong_words(base: Path, run: Path, tmp_path: Path) -> None:
    cases = [
        (subject(base, run), "ggufs", {}, "did you mean 'gguf'"),
        (subject(base), "peft", {}, "has no adapter"),
        (subject(base), "gguf-lora", {}, "has no adapter"),
        (subject(base), "vllm", {"name": "a"}, "has no adapter"),
        (subject(base, run), "peft", {"type": "F16"}, "keeps the adapter's own numbers"),
        (subject(base, run), "gguf-lora", {"type": "Q8_0"}, "is not for an adapter"),
        (subject(base, run), "hf", {"onto": str(base)}, "is not quantized"),
    ]
    for live, to, options, line in cases:
        with pytest.raises(ConfigError, match=line):
            export_subject(live, to, tmp_path / "out.gguf", replace(QUIET, **options))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="this format is one file"):
        export_subject(subject(base), "gguf", tmp_path / "folder", QUIET)


def test_the_command(command: Any, base: Path, tmp_path: Path) -> None:
    code, out, err = command("export", base, tmp_path / "m.gguf", "--to", "gguf", "--type", "q8_0", "--no-read-back")
    assert (code, out) == (0, f"{tmp_path / 'm.gguf'}\n"), err
    assert "read back" in err
    code, out, err = command("export", tmp_path / "m.gguf", tmp_path / "again", "--no-read-back", "--json")
    assert code == 0 and json.loads(out)["to"] == "hf", err
    assert agree(theirs(tmp_path / "again"), logits(load_model(tmp_path / "m.gguf"), TOKENS))
    code, _, err = command("export", base)
    assert code == 2 and "OUT is missing" in err
    code, _, err = command("export", base, tmp_path / "x", "--to", "onnx")
    assert code == 2 and "--to: 'onnx' is not known" in err


def test_a_base_with_weights_that_no_config_says(base: Path, tmp_path: Path) -> None:
    """write_model says what it cannot: a family without such biases."""
    live = subject(base)
    config = replace(live.model.config, qkv_bias=True)
    with pytest.raises(ModelError, match="cannot say qkv_bias=True"):
        write_model(tmp_path, config, {}, live.tokenizer, torch.float32)
