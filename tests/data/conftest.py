"""A small byte-level BPE tokenizer made in memory, with the special tokens of a chat model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from tunesmith.tokenizer import Tokenizer, load_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>"]
CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\n\n### Input:\n\n### Response:\nClassify the sentiment of the text as negative or positive.",
    "system\nYou are a helpful AI assistant\nuser\nassistant\nWhat is 2 + 2? The answer is four, not five.",
]


def bpe() -> tokenizers.Tokenizer:
    """Train the tokenizer: all bytes, a few hundred merges, special tokens as in SPECIAL."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    return made


def write_folder(
    folder: Path,
    *,
    bos: str | None = None,
    eos: str | None = "<|im_end|>",
    add_bos: bool = False,
    chat_template: str | None = None,
) -> Path:
    """Write the tokenizer as a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    bpe().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "add_bos_token": add_bos,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


# SmolLM2-135M-Instruct's chat template, from its GGUF file's metadata
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tokenizer]:
    """Return the maker of tokenizers: make_tokenizer(bos=..., eos=..., add_bos=..., chat_template=...)."""

    def make(**settings: Any) -> Tokenizer:
        return load_tokenizer(write_folder(tmp_path_factory.mktemp("tokenizer"), **settings))

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., Tokenizer]) -> Tokenizer:
    """Return a tokenizer as SmolLM2's: EOS <|im_end|>, BOS <|im_start|> that is not added, its chat template."""
    return make_tokenizer(bos="<|im_start|>", chat_template=SMOLLM2)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the same tokenizer, for other libraries to read."""
    return write_folder(tmp_path_factory.mktemp("reference"))
