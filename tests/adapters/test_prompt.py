"""Prompt tuning against PEFT's: logits, gradients and files; where it starts; infix tokens; counts; refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tests.adapters.exchange import SIZES, check_ours, check_theirs, save
from tests.laws.peers import padded_step, twin_models, wide_norms
from tests.laws.small import build, disturb, examples, logits_of, packs_of, relative, run_packs
from tests.model.checkpoints import reference

from tunesmith.adapters import attach
from tunesmith.adapters.peft_format import load_adapter
from tunesmith.data.encode import Example
from tunesmith.errors import AdapterError, ConfigError
from tunesmith.export.counts import count
from tunesmith.model.layout import Layout
from tunesmith.model.load import load_model
from tunesmith.tokenizer import load_tokenizer

V = 5
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "mistral window": ("Mistral", {"sliding_window": 7}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
}
CONFIG = {"task_type": "CAUSAL_LM", "num_virtual_tokens": V}


def behind(model: Any, count: int) -> Any:
    """The model without the logits of its virtual tokens."""
    return lambda **given: SimpleNamespace(logits=model(**given).logits[:, count:])


@pytest.mark.parametrize("family", FAMILIES)
def test_parity_with_peft(family: str) -> None:
    """One pack of ours, the virtual tokens standing there once, equals a padded batch of theirs."""
    kind, options = FAMILIES[family]
    with wide_norms():
        ours, theirs = twin_models(getattr(tf, f"{kind}Config")(**{**SIZES, **options}), torch.float64)
        model = peft.get_peft_model(theirs, peft.PromptTuningConfig(**CONFIG)).double()
        adapter = attach(ours, {"kind": "prompt", "virtual_tokens": V})
        disturb(adapter)
        weight = model.prompt_encoder["default"].embedding.weight
        with torch.no_grad():
            weight.copy_(adapter.trainable["model.embed.prompt"])
        some = examples()
        (pack,) = packs_of(ours, some)
        assert len(pack.tokens) < 0.8 * sum(len(e.ids) for e in some)
        loss, gradient = run_packs(ours, [pack], adapter)
        logits = logits_of(ours, pack.tokens, pack.layout)
        their_logits, their_loss, their_gradient = padded_step(behind(model, V), some, {"prompt": weight})
    for example, rows in zip(pack.examples, pack.rows, strict=True):
        assert relative(logits[torch.from_numpy(rows)], their_logits[example]) < 1e-8
    assert abs(loss - their_loss) <= 1e-10 * their_loss and their_gradient.norm() > 0
    assert relative(gradient, their_gradient) < 1e-8


@pytest.mark.parametrize("settings", [{"virtual_tokens": 7}, {"init": "normal"}, {"init_ids": [3, 1, 4]}])
def test_ours_in_peft_and_back(settings: dict, tmp_path: Path) -> None:
    check_ours({"kind": "prompt", **settings}, tmp_path)
    tensors = load_file(tmp_path / "ours/adapter_model.safetensors")
    assert {key: tuple(t.shape) for key, t in tensors.items()} == {
        "prompt_embeddings": (settings.get("virtual_tokens", 20), 64)
    }


@pytest.mark.parametrize("init", ["RANDOM", "SAMPLE_VOCAB"])
def test_theirs_here_and_back(init: str, tmp_path: Path) -> None:
    check_theirs(peft.PromptTuningConfig(**CONFIG, prompt_tuning_init=init), tmp_path)


@pytest.mark.parametrize("size", [3, 40])
def test_a_text_starts_as_pefts_does(size: int, tiny_base: Path) -> None:
    """Cut to the number of virtual tokens, or said again."""
    text = "classify the review as good or bad"
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=size,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=str(tiny_base),
    )
    theirs = peft.get_peft_model(tf.AutoModelForCausalLM.from_pretrained(tiny_base), config)
    spec = {"kind": "prompt", "virtual_tokens": size, "init_text": text}
    adapter = attach(load_model(tiny_base), spec, encode=load_tokenizer(tiny_base).encode)
    expected = theirs.prompt_encoder["default"].embedding.weight
    assert torch.equal(adapter.trainable["model.embed.prompt"], expected)
    assert len(adapter.settings.init_ids) == size and adapter.settings.init_text == text


def test_where_it_starts() -> None:
    model = build()
    table = model.model.embed_tokens.weight.detach()
    drawn, again, other = (
        attach(model, {"kind": "prompt", "virtual_tokens": 40}, name, seed).trainable["model.embed.prompt"]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert all(any(torch.allclose(row, token, atol=1e-6) for token in table) for row in drawn)
    assert torch.equal(drawn, again) and not torch.equal(drawn, other)
    spec = {"kind": "prompt", "virtual_tokens": 4000, "init": "normal"}
    normal = attach(model, spec, "d").trainable["model.embed.prompt"]
    assert normal.std().item() == pytest.approx(table.square().mean().sqrt().item(), rel=0.02)
    assert abs(normal.mean().item()) < 0.01


def by_hand(model: Any, ids: list[int], prompt: torch.Tensor, infix: torch.Tensor, at: list[int]) -> torch.Tensor:
    """Logits of the bare base for embeddings put together by hand, infix ones before the tokens `at`."""
    rows = list(prompt)
    for i, token in enumerate(ids):
        rows += [*(list(infix) if i in at else []), model.model.embed_tokens.weight[token]]
    h = torch.stack(rows)
    ctx = model.context(Layout.single(len(h)), adapters=())
    with torch.no_grad():
        for block in model.model.layers:
            h = block(h, ctx)
        return model.logits(model.model.norm(h, ctx), ctx)[len(prompt) :]


def test_infix_tokens_stand_before_the_answer() -> None:
    """Of a conversation, each answer has its own, and none before the earlier ones: as when it is generated."""
    model = build()
    adapter = attach(model, {"kind": "prompt", "virtual_tokens": 3, "infix_tokens": 2})
    disturb(adapter)
    ids = list(range(5, 17))
    told = np.isin(np.arange(12), [4, 5, 9, 10, 11])
    (pack,) = packs_of(model, [Example(np.array(ids, np.int32), told, "")])
    logits = logits_of(model, pack.tokens, pack.layout)
    for rows, (start, end) in zip(pack.rows, ((4, 6), (9, 12)), strict=True):
        expected = by_hand(model, ids[:end], *adapter.trainable.values(), at=[start])
        assert torch.allclose(logits[torch.from_numpy(rows)], expected, rtol=0, atol=1e-12)
    assert sorted(pack.target.tolist()) == [9, 10, 14, 15, 16], "an infix token is never a target"
    first = pack.where[(pack.target == 9) | (pack.target == 14)]
    assert pack.tokens[first].tolist() == [-2, -2], "and the last of them predicts the answer's first token"


def test_infix_tokens_are_saved_in_our_own_format(tmp_path: Path) -> None:
    reference("llama").save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    adapter = attach(model, {"kind": "prompt", "virtual_tokens": 2, "infix_tokens": 3, "init_ids": [5, 6]})
    disturb(adapter)
    save(adapter, tmp_path / "ours")
    assert not (tmp_path / "ours/adapter_config.json").exists()
    shapes = {k: tuple(t.shape) for k, t in load_file(tmp_path / "ours/adapter.safetensors").items()}
    assert shapes == {"model.embed.prompt": (2, 64), "model.embed.infix": (3, 64)}
    again = load_adapter(tmp_path / "ours", load_model(tmp_path / "base"))
    assert again.settings == adapter.settings
    assert all(torch.equal(value, again.state()[key]) for key, value in adapter.state().items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_virtual_tokens": 6}, r"prompt_embeddings has shape \[5, 64\], expected \[6, 64\]"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens='None' should be a positive integer"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules='2' changes what"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"later_key": 3}, "later_key='3' changes what"),
    ],
)
def test_a_file_that_says_something_else_is_refused(change: dict, said: str, tmp_path: Path) -> None:
    check_theirs(peft.PromptTuningConfig(**CONFIG), tmp_path)
    path = tmp_path / "theirs/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=said):
        load_adapter(tmp_path / "theirs", load_model(tmp_path / "base"))


def test_another_tensor_in_the_file_is_named(tmp_path: Path) -> None:
    check_theirs(peft.PromptTuningConfig(**CONFIG), tmp_path)
    path = tmp_path / "theirs/adapter_model.safetensors"
    save_file({**load_file(path), "task_rows": torch.zeros(2)}, path)
    with pytest.raises(AdapterError, match="task_rows is unexpected"):
        load_adapter(tmp_path / "theirs", load_model(tmp_path / "base"))


@pytest.mark.parametrize(
    ("model", "settings", "expected"),
    [
        ("llama-7b", {"virtual_tokens": 8}, 32_768),
        ("llama-7b", {"virtual_tokens": 25}, 102_400),
        ("llama-7b", {"virtual_tokens": 80}, 327_680),
        ("gpt3-shaped", {"virtual_tokens": 256, "infix_tokens": 8}, 3_244_032),  # 3.2M in arXiv:2106.09685
        ("llama-7b", {"virtual_tokens": 8, "init": "normal"}, 32_768),
    ],
)
def test_count(model: str, settings: dict, expected: int) -> None:
    assert count(model, "prompt", settings)["trainable_parameters"] == expected


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"virtual_tokens": 0}, "both 0, so there is nothing to train"),
        ({"init": "normal", "init_text": "good"}, "both say where to start"),
        ({"virtual_tokens": 0, "infix_tokens": 2, "init_ids": [3]}, "there are none"),
        ({"init_text": "good"}, "only a tokenizer makes ids of it"),
        ({"init_ids": [3, 61]}, r"\[3, 61\] should be tokens of a vocabulary of 61"),
        ({"init_ids": []}, "should be tokens"),
        ({"virtual_token": 3}, "did you mean 'virtual_tokens'"),
    ],
)
def test_settings_that_cannot_be_meant(spec: dict, said: str) -> None:
    with pytest.raises((ConfigError, AdapterError), match=said):
        attach(build(), {"kind": "prompt", **spec})


def test_a_text_without_a_token_is_refused() -> None:
    with pytest.raises(AdapterError, match="holds no token to start from"):
        attach(build(), {"kind": "prompt", "init_text": ""}, encode=lambda text: [])
