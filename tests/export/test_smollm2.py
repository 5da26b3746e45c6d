"""The real model, out and back: what llama.cpp and transformers compute from our files is what we compute.

The base is the catalog's Q4_1 GGUF: every number exported here was few bits before.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.export.small_run import train_like
from tests.tokenizer.llama_cpp import LlamaCpp
from tests.tokenizer.vocabularies import CORPUS

from tunesmith.adapters import Adapter
from tunesmith.data.encode import encode_prompt
from tunesmith.data.schemas import chat_row
from tunesmith.data.templates import get_template
from tunesmith.export.fold import merged_weights
from tunesmith.export.gguf import GgufModel, write_gguf
from tunesmith.export.gguf_lora import write_lora
from tunesmith.export.gguf_tokenizer import tokenizer_fields
from tunesmith.export.hf import write_model
from tunesmith.export.readback import forced
from tunesmith.inference import GenerationSettings, generate
from tunesmith.model.llama import Llama
from tunesmith.model.load import load_model
from tunesmith.tokenizer import Tokenizer, load_tokenizer

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.usefixtures("single_thread"),
    pytest.mark.skipif(
        importlib.util.find_spec("xllamacpp") is None,
        reason="NOT TESTED: what llama.cpp reads; install xllamacpp (in the extra test)",
    ),
]

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea and the wind.",
    "What is 12 times 12?",
    "Who wrote Hamlet?",
    "Explain gravity to a child.",
    "List two uses of a brick.",
    "Translate 'good morning' into Spanish.",
    "def add(a, b):",
    "Why is the sky blue?",
]
NEW = 64


class Real:
    """Model, adapter and tokenizer in float32, ten prompts, and the files made of them."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.model: Llama = load_model(source)
        self.tokenizer: Tokenizer = load_tokenizer(source)
        template = get_template("chat", self.tokenizer)
        rows = [chat_row([{"role": "user", "content": text}], "q") for text in QUESTIONS]
        self.prompts = [encode_prompt(row, template, self.tokenizer) for row in rows]
        self.tensors, _, self.config = merged_weights(self.model, None, torch.float32)
        self.folder = folder

    def gguf(self, kind: str) -> Path:
        path = self.folder / f"{kind}.gguf"
        fields, _ = tokenizer_fields(self.tokenizer, self.config.vocab_size, self.tokenizer.chat_template)
        write_gguf(path, GgufModel(self.config, self.tensors, fields), kind)
        return path

    def greedy(self, adapters: tuple[str, ...], which: slice, new: int) -> list[list[int]]:
        settings = GenerationSettings(max_new_tokens=new)
        eos = self.tokenizer.eos_ids
        found = generate(
            self.model, self.prompts[which], settings, eos_ids=eos, tokenizer=self.tokenizer, adapters=adapters
        )
        return [list(answer.ids) for answer in found]


def answers(server: LlamaCpp, prompts: list[list[int]], scale: float | None = None, new: int = NEW) -> list[Any]:
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: server.greedy(prompt, new, scale), prompts))


@pytest.fixture(scope="module")
def real(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Real:
    return Real(smollm2_gguf, tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def adapter(real: Real) -> Adapter:
    return train_like(
        real.model, {"kind": "lora", "rank": 4, "target_modules": ["q_proj", "k_proj", "down_proj"]}, 0.02
    )


@pytest.fixture(scope="module")
def in_full(real: Real, adapter: Adapter) -> Iterator[LlamaCpp]:
    """llama.cpp with the F32 file and the adapter beside it."""
    write_lora(real.folder / "lora.gguf", adapter, real.config, "F32", "lora")
    server = LlamaCpp(real.gguf("F32"), real.folder / "lora.gguf", slots=10)
    yield server
    server.close()


def test_f32_gives_the_same_64_greedy_tokens_on_ten_prompts(real: Real, in_full: LlamaCpp) -> None:
    ours = real.greedy((), slice(10), NEW)
    eos = real.tokenizer.eos_id
    theirs = [tokens[:-1] if tokens[-1] == eos else tokens for tokens, _ in answers(in_full, real.prompts, 0.0)]
    assert theirs == ours
    assert sum(map(len, ours)) > 300


def test_the_adapter_beside_it_changes_the_answers_as_ours_does(real: Real, in_full: LlamaCpp) -> None:
    there = [tokens for tokens, _ in answers(in_full, real.prompts[2:5], 1.0, 16)]
    ours = real.greedy(("default",), slice(2, 5), 16)
    assert there == ours
    assert ours != real.greedy((), slice(2, 5), 16)


def test_token_ids_on_the_corpus(real: Real, in_full: LlamaCpp) -> None:
    for text in CORPUS:
        for special in (False, True):
            assert real.tokenizer.encode(text, special=special) == in_full.tokens(text, special=special), text
    said = in_full.ask("/apply-template", {"messages": [{"role": "user", "content": QUESTIONS[0]}]})["prompt"]
    assert in_full.tokens(said, special=True, bos=True) == real.prompts[0]


def test_f16_agrees_wherever_the_choice_is_clear(real: Real) -> None:
    """llama.cpp's greedy answers forced through our float32 model: top-1 >= 99%, else the top two within .05."""
    server, prompts = LlamaCpp(real.gguf("F16"), slots=5), real.prompts[::2]
    try:
        found = answers(server, prompts)
    finally:
        server.close()
    ours = forced(real.model, prompts, [tokens for tokens, _ in found], ()).log_softmax(-1)
    tokens = torch.tensor([token for row, _ in found for token in row])
    behind = ours.max(-1).values - ours.gather(1, tokens[:, None])[:, 0]
    assert float((behind == 0).double().mean()) >= 0.99
    assert float(behind.max()) < 0.05


def test_transformers_loads_the_quantized_base_as_a_folder(real: Real, tmp_path: Path) -> None:
    import transformers

    write_model(tmp_path, real.config, real.tensors, real.tokenizer, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    row = real.prompts[0]
    with torch.no_grad():
        logits = theirs(torch.tensor([row])).logits[0]
    ours = forced(real.model, [row[:1]], [[*row[1:], 0]], ())
    assert float((logits - ours).abs().max()) <= 1e-5 * float(ours.abs().max())
    prompt = theirs_prompt(tmp_path, QUESTIONS[0])
    assert prompt == row


def theirs_prompt(folder: Path, text: str) -> list[int]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    said = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(rendered, add_special_tokens=False)
