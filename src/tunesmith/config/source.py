"""Read YAML safely and remember where each key stood, so that an error can name the line.

Scalars follow YAML 1.2's core schema: `1e-4` is a number, and `no`, `on` or `2026-01-01` are words (a list of labels
`[yes, no]` stays two words).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import ConfigError

MAX_BYTES = 64 * 1024
MAX_NODES = 10_000  # visited through aliases as well, so that a few lines cannot unfold into gigabytes
MAX_DEPTH = 20

Origins = dict[tuple[str, ...], str]


class Located(dict[str, Any]):
    """A mapping that knows where its keys were written: `origins[("rank",)] == "config.yaml line 7"`."""

    def __init__(self, values: Mapping[str, Any], origins: Origins | None = None) -> None:
        super().__init__(values)
        self.origins: Origins = dict(origins or {})


_SCALARS = {
    "tag:yaml.org,2002:null": r"^(?:~|null|Null|NULL|)$",
    "tag:yaml.org,2002:bool": r"^(?:true|True|TRUE|false|False|FALSE)$",
    "tag:yaml.org,2002:int": r"^[-+]?[0-9]+$",
    "tag:yaml.org,2002:float": r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$",
}
_PATTERNS = [(tag, re.compile(pattern)) for tag, pattern in _SCALARS.items()]
_RESOLVERS = {None: _PATTERNS}
_START = yaml.Mark("", 0, 0, 0, "", 0)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _RESOLVERS

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value that occurs twice twice: a configuration is read by people."""
        return True


def _quoted(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Double quotes for text with line breaks or invisible characters: plain styles fold or lose some of them."""
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _quoted)


def dump(values: Mapping[str, Any]) -> str:
    """Return `values` (plain mappings, lists, scalars) as YAML that `parse` reads back equal."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def read(path: Path) -> Located:
    """Return the mapping that the YAML file `path` holds. Raises ConfigError naming file and line."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(
            f"{path}: larger than {MAX_BYTES // 1024} KiB, which no configuration is; is it the right file?"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); is it the right file?") from None
    return parse(text, path.name)


def parse(text: str, name: str) -> Located:
    """Return the mapping that YAML `text` holds; `name` is what errors call it. Raises ConfigError."""
    node = _compose(text, name)
    if node is None or (isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null")):
        return Located({})
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{name}: should be a mapping of keys to values, such as 'model_name_or_path: ...'")
    reader = _Reader(name)
    values = reader.value(node, (), 0)
    return Located(values, reader.origins)


def parse_value(text: str, where: str) -> Any:
    """Return the value of one `key=value` override: `3`, `1e-4`, `true`, `[q_proj, v_proj]`, or words as they are.

    Words need no quotes: `data.instruction=Rate it: good #1 or bad`. Raises ConfigError naming `where`.
    """
    text = text.strip()
    if text[:1] in ("[", "{", '"', "'"):
        node = _compose(text, where)
    else:
        tag = next((tag for tag, pattern in _PATTERNS if pattern.match(text)), "tag:yaml.org,2002:str")
        node = yaml.ScalarNode(tag, text, _START, _START)
    return None if node is None else _Reader(where).value(node, (), 0)


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark is not None and "\n" in text else ""
        raise ConfigError(f"{name}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply for a configuration") from None


class _Reader:
    """Turns nodes into values, once each place they are seen from, and notes the line of each key."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.origins: Origins = {}
        self.nodes = 0

    def value(self, node: yaml.Node, path: tuple[str, ...], depth: int) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or depth > MAX_DEPTH:
            raise ConfigError(f"{self.at(node)}: too large or too deep for a configuration; are there aliases in it?")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.value(item, (*path, str(i)), depth + 1) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        raise ConfigError(f"{self.at(node)}: the tag {node.tag!r} is not allowed")

    def mapping(self, node: yaml.MappingNode, path: tuple[str, ...], depth: int) -> dict[str, Any]:
        if node.tag != "tag:yaml.org,2002:map":
            raise ConfigError(f"{self.at(node)}: the tag {node.tag!r} is not allowed")
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{self.at(key_node)}: a key must be a word")
            key = str(key_node.value)
            here = (*path, key)
            if key in values:
                first = self.origins[here].removeprefix(f"{self.name} ")
                raise ConfigError(f"{'.'.join(here)}: given twice ({self.at(key_node)}, first on {first}); keep one")
            self.origins[here] = self.at(key_node)
            values[key] = self.value(value_node, here, depth + 1)
        return values

    def scalar(self, node: yaml.ScalarNode) -> Any:
        kind, text = node.tag.rpartition(":")[2], node.value
        if node.tag.startswith("tag:yaml.org,2002:"):
            try:
                if kind == "str":
                    return text
                if kind == "null":
                    return None
                if kind == "bool":
                    return {"true": True, "false": False}[text.lower()]
                if kind == "int":
                    return int(text)
                if kind == "float":
                    return float(text.replace(".inf", "inf").replace(".nan", "nan"))
            except (ValueError, KeyError):
                raise ConfigError(f"{self.at(node)}: {text[:40]!r} is not a valid {kind}") from None
        raise ConfigError(f"{self.at(node)}: the tag {node.tag!r} is not allowed")

    def at(self, node: yaml.Node) -> str:
        """The line a node begins on, such as `config.yaml line 7`."""
        return f"{self.name} line {node.start_mark.line + 1}"
