"""Tokenizers out of a Hugging Face folder: tokenizer.json, or tokenizer.model, with the settings that lie beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.errors import TokenizerError
from tunesmith.model.fields import Fields, read_json
from tunesmith.tokenizer.base import Engine, Roles, Tokenizer
from tunesmith.tokenizer.fast import FastEngine
from tunesmith.tokenizer.spm import SentencePieceEngine

_MOST_FILE = 128 << 20
_ROLES = ("bos", "eos", "pad", "unk")


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """Build the tokenizer of a folder. Each setting comes from the first file that says it:

    tokenizer_config.json, special_tokens_map.json, the tokenizer's own file, config.json.
    """
    settings = _optional(folder / "tokenizer_config.json")
    named = _named_tokens(settings, _optional(folder / "special_tokens_map.json"))
    extra = _added_tokens(folder, settings)
    engine: FastEngine | SentencePieceEngine
    if (folder / "tokenizer.json").is_file():
        text = _bytes(folder / "tokenizer.json").decode("utf-8", "replace")
        names = [name for name in named.values() if name]
        engine = FastEngine.parse(text, str(folder / "tokenizer.json"), extra, names)
        own: dict[str, int] = {}
    elif (folder / "tokenizer.model").is_file():
        legacy = settings.get("legacy") is not False  # transformers: an unsaid `legacy` is true
        engine = SentencePieceEngine(_bytes(folder / "tokenizer.model"), str(folder / "tokenizer.model"), extra, legacy)
        own = {
            role: index
            for role, index in zip(("bos", "eos", "pad", "unk"), engine.own_roles, strict=True)
            if index >= 0
        }
    else:
        raise TokenizerError(
            f"{folder}: no tokenizer.json or tokenizer.model; download the folder again, tokenizer included"
        )
    roles = _roles(folder, engine, settings, named, own)
    return Tokenizer(engine, roles, where=str(folder), chat_template=_chat_template(folder, settings))


def _roles(
    folder: Path, engine: Engine, settings: dict[str, Any], named: dict[str, str | None], own: dict[str, int]
) -> Roles:
    config = Fields(_optional(folder / "config.json"), str(folder / "config.json"))
    generation = Fields(_optional(folder / "generation_config.json"), str(folder / "generation_config.json"))
    found: dict[str, int | None] = {}
    for role in _ROLES:
        name = named.get(role)
        index = engine.id(name) if name else own.get(role)
        if name and index is None:
            raise TokenizerError(
                f"{folder}: {role}_token {name!r} is not in the vocabulary; correct tokenizer_config.json"
            )
        found[role] = index
    for role in ("bos", "pad"):
        if role not in named and found[role] is None:
            found[role] = config.token(f"{role}_token_id", None)
    eos = [] if found["eos"] is None else [found["eos"]]
    eos += [*Fields(settings, str(folder / "tokenizer_config.json")).tokens("eos_token_ids", ())]
    eos += (
        generation.tokens("eos_token_id", ()) or config.tokens("eos_token_id", ())
        if not _swapped(found, config)
        else ()
    )
    add_bos = settings.get("add_bos_token")
    if not isinstance(add_bos, bool):
        add_bos = engine.begins_with(found["bos"]) if isinstance(engine, FastEngine) else True
    return Roles(
        found["bos"], tuple(dict.fromkeys(eos)), found["pad"], found["unk"], add_bos and found["bos"] is not None
    )


def _swapped(found: dict[str, int | None], config: Fields) -> bool:
    """Early LLaMA conversions say that BOS ends a text; `check_fits` names it."""
    return (
        found["bos"] is not None and found["bos"] != found["eos"] and found["bos"] in config.tokens("eos_token_id", ())
    )


def _named_tokens(settings: dict[str, Any], special_map: dict[str, Any]) -> dict[str, str | None]:
    """role -> the token's text, or None where a file says that there is none."""
    out: dict[str, str | None] = {}
    for role in _ROLES:
        for source in (settings, special_map):
            value = source.get(f"{role}_token")
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str) and content:
                out[role] = content
                break
            if f"{role}_token" in source and value is None:
                out.setdefault(role, None)
    return out


def _added_tokens(folder: Path, settings: dict[str, Any]) -> list[tuple[int, str, bool]]:
    """(id, content, special) of tokens that tokenizer_config.json or added_tokens.json add."""
    out = {}
    for content, index in _optional(folder / "added_tokens.json").items():
        out[str(index)] = (content, False)
    decoder = settings.get("added_tokens_decoder", {})
    for index, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            out[str(index)] = (token["content"], bool(token.get("special", False)))
    added = []
    for index, (content, special) in out.items():
        if not index.isdecimal() or len(index) > 9 or not content:
            raise TokenizerError(
                f"{folder}: added token {content[:40]!r} has the id {index[:40]!r}; correct added tokens"
            )
        added.append((int(index), content, special))
    return added


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return _bytes(folder / "chat_template.jinja", 1 << 20).decode("utf-8", "replace")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _optional(path: Path) -> dict[str, Any]:
    value = read_json(path, TokenizerError) if path.is_file() else {}
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: holds a {type(value).__name__}, not a mapping of keys; download it again")
    return value


def _bytes(path: Path, most: int = _MOST_FILE) -> bytes:
    try:
        if path.stat().st_size > most:
            raise TokenizerError(f"{path}: {path.stat().st_size} bytes; at most {most} are read")
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror})") from None
