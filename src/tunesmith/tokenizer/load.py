"""Find a model's tokenizer, and hold it against the model."""

from __future__ import annotations

from pathlib import Path

from tunesmith.errors import TokenizerError
from tunesmith.model.config import ModelConfig
from tunesmith.model.gguf_file import GgufFile
from tunesmith.tokenizer.base import Tokenizer
from tunesmith.tokenizer.folder import tokenizer_from_folder
from tunesmith.tokenizer.gguf_vocabulary import tokenizer_from_gguf


def load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a Hugging Face folder or a .gguf file; TokenizerError says what is wrong with it."""
    path = Path(path)
    if path.is_dir():
        return tokenizer_from_folder(path)
    if not path.exists():
        raise TokenizerError(f"{path}: no such folder or file")
    with GgufFile(path) as file:
        return tokenizer_from_gguf(file.metadata, str(path))


def check_fits(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raise TokenizerError, naming the cure, where this tokenizer cannot be this model's.

    Padding that equals EOS is no error (SmolLM2): nothing may mask by the padding id.
    """
    where = tokenizer.where
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model embeds {config.vocab_size}: it is of "
            "another model; use the tokenizer that came with the weights"
        )
    if tokenizer.eos_id is None:
        raise TokenizerError(
            f"{where}: no EOS token is named, so answers would never end; name it in tokenizer_config.json (eos_token)"
        )
    roles = [("bos", tokenizer.bos_id), ("pad", tokenizer.pad_id), *(("eos", index) for index in tokenizer.eos_ids)]
    for role, index in roles:
        if index is not None:
            _check_special(tokenizer, role, index)
    bos = tokenizer.bos_id
    if bos is not None and bos != tokenizer.eos_id and bos in config.eos_token_ids:
        raise TokenizerError(
            f"{where}: the tokenizer begins texts with {tokenizer.token(bos)!r} ({bos}), but the config ends them with "
            f"it; set eos_token_id to {tokenizer.eos_id} in config.json"
        )


def _check_special(tokenizer: Tokenizer, role: str, index: int) -> None:
    """The id exists, its string becomes it again in trusted text, and never does in a user's."""
    cure = f"correct {role}_token in tokenizer_config.json"
    if not 0 <= index < tokenizer.vocab_size:
        raise TokenizerError(
            f"{tokenizer.where}: {role} id {index} is not in the vocabulary ({tokenizer.vocab_size}); {cure}"
        )
    token = tokenizer.token(index)
    if index in tokenizer.encode(token) or tokenizer.encode(token, special=True) != [index]:
        raise TokenizerError(
            f"{tokenizer.where}: {role} token {token!r} (id {index}) is not a special token there; {cure}"
        )
