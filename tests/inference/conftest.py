"""A small random model twice, as transformers' and as ours in float64, and a tokenizer of single bytes."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from tunesmith.model.config import ModelConfig
from tunesmith.model.llama import Llama
from tunesmith.tokenizer import Tokenizer, load_tokenizer


@dataclass
class Twins:
    """The same weights in both implementations."""

    theirs: torch.nn.Module
    ours: Llama


def make_twins(seed: int = 0, vocab: int = 97, scale: float = 6.0, **changes: object) -> Twins:
    """A random LLaMA whose weights are large enough that its likeliest tokens are far apart."""
    import transformers

    sizes: dict[str, object] = {
        "vocab_size": vocab, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    kind = changes.pop("kind", "Llama")
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    torch.manual_seed(seed)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" not in name:
                parameter.mul_(scale)
    with torch.device("meta"):
        ours = Llama(ModelConfig.from_hf(config.to_dict()))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    ours.tie_weights()
    return Twins(theirs, ours.requires_grad_(False).eval())


@pytest.fixture(scope="session")
def twins() -> Twins:
    """The plain small model."""
    return make_twins()


@pytest.fixture(scope="session")
def twins_maker() -> Callable[..., Twins]:
    """`make_twins`, for other sizes and families."""
    return make_twins


@pytest.fixture
def prompts() -> list[list[int]]:
    """Ragged prompts: some begin alike, one is the beginning of another, two are equal."""
    draw = torch.Generator().manual_seed(3)
    begin = torch.randint(0, 97, (11,), generator=draw).tolist()
    tails = [torch.randint(0, 97, (n,), generator=draw).tolist() for n in (1, 7, 20)]
    return [begin + tails[0], begin + tails[1], begin, begin + tails[2], tails[2], begin + tails[1]]


class ByteTokenizer:
    """Token i is byte i of UTF-8; tokens from 256 on are special and have no text."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def streamer(self) -> ByteStreamer:
        return ByteStreamer()


class ByteStreamer:
    """Complete characters of the bytes so far."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int, /) -> str:
        return self._decoder.decode(bytes([token])) if token < 256 else ""

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


@pytest.fixture
def byte_tokenizer() -> ByteTokenizer:
    """See ByteTokenizer."""
    return ByteTokenizer()


CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A real tokenizer whose tokens are single bytes, with the special tokens of a chat model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


@pytest.fixture
def chat_model(chat_tokenizer: Tokenizer) -> Llama:
    """A random model over that tokenizer's vocabulary that says lower-case letters and spaces only, and never ends."""
    model = make_twins(seed=4, scale=1.5, vocab=258, max_position_embeddings=1024).ours
    said = torch.zeros(258, dtype=torch.bool)
    said[chat_tokenizer.encode("abcdefghijklmnopqrstuvwxyz ")] = True
    run = model.logits
    model.logits = lambda hidden, ctx: run(hidden, ctx).masked_fill(~said, -torch.inf)  # type: ignore[method-assign]
    return model
