"""Convert an adapter that another tool saved as a pickle into safetensors and JSON that Tunesmith loads.

    python tools/convert_adapter.py SOURCE --out FOLDER [--base NAME]

SOURCE is a checkpoint of Lit-LLaMA or LitGPT (adapter, adapter_v2, lora), a folder with PEFT's adapter_model.bin, or a
folder that pyreft saved; which one it is shows in the names of its tensors. What cannot be said exactly is refused.
docs/interchange.md tells what each source needs and what is refused.

Pickles can run code when they are opened. This script needs torch and safetensors, nothing of Tunesmith: run it where
you trust the file, or where it can do no harm. Only a child process opens it, with torch.load(weights_only=True),
which builds tensors and plain containers and nothing else, with limits on its memory and time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from convert_lit import convert_lit
from convert_pyreft import convert_pyreft
from convert_result import Refused, Result
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SECONDS = 300  # for reading one pickle
MEMORY = 1 << 30  # bytes that the child may take beyond what it has when it starts and four times the file
MAX_JSON = 16 << 20
FORMAT = 1  # of tunesmith.json


@dataclass(frozen=True)
class Source:
    """What was found: the pickles to read, by a short name, and what stands beside them."""

    kind: str
    files: dict[str, Path]
    folder: Path


def find(source: Path) -> Source:
    """Tell what `source` is by its files. Raises Refused."""
    if source.is_file():
        if source.name == "adapter_model.bin":
            return find(source.parent)
        return Source("lit", {"model": source}, source.parent)
    if not source.is_dir():
        raise Refused(f"{source}: no such file or folder")
    if (source / "intervenable_model").is_dir():  # as pyreft's trainer saves it
        source = source / "intervenable_model"
    weights = source / "adapter_model.bin"
    if weights.is_file():
        return Source("peft", {"model": weights}, source)
    if edits := {path.stem.removeprefix("intkey_"): path for path in sorted(source.glob("intkey_*.bin"))}:
        return Source("pyreft", edits, source)
    checkpoints = [path for pattern in ("*.pth", "*.pth.*", "*.ckpt") for path in sorted(source.glob(pattern))]
    named = [path for path in checkpoints if re.search(r"lora|adapter", path.name)]
    if len(named) == 1:
        return Source("lit", {"model": named[0]}, source)
    found = ", ".join(path.name for path in named or checkpoints) or "none"
    raise Refused(f"{source}: give the checkpoint itself (found: {found}), or a folder of PEFT's or of pyreft's")


def read(source: Source, keep: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the name and tensors of each pickle, which a child process opens. Raises Refused."""
    for number, (name, path) in enumerate(source.files.items()):
        plain = keep / f"{number}.safetensors"
        command = [sys.executable, os.fspath(Path(__file__).resolve()), "--child", os.fspath(path), os.fspath(plain)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise Refused(f"{path}: not read within {SECONDS} s; is it an adapter?") from None
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
            raise Refused(f"{path}: {said.removeprefix('error: ')[:300]}")
        with safe_open(plain, framework="pt") as file:
            yield name, {key: file.get_tensor(key).clone() for key in file.keys()}
        plain.unlink()


def open_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, by name: the only place that opens one. Raises Refused."""
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):  # as LitGPT saves it
        loaded = loaded["model"]
    if not isinstance(loaded, dict):
        raise Refused(f"holds {type(loaded).__name__}, not tensors by name")
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        raise Refused(
            f"an empty adapter of {path.stat().st_size} bytes: its state dict was filtered twice when it was saved, so "
            "the trained weights are not in it; train again, or look for a checkpoint of the same run"
        )
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


Reader = Callable[[Source, Path], Iterable[tuple[str, dict[str, Tensor]]]]


def convert_peft(source: Source, tensors: dict[str, Tensor]) -> Result:
    """PEFT's tensors and its configuration as they are: Tunesmith checks both when it loads them."""
    config = read_json(source.folder / "adapter_config.json")
    if not isinstance(config.get("peft_type"), str):
        raise Refused(f"{source.folder / 'adapter_config.json'}: names no peft_type")
    return Result(peft=config, tensors=tensors)


def write(result: Result, folder: Path, base: str | None) -> None:
    """Write the folder that `tunesmith` reads."""
    folder.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in result.tensors.items()}
    if result.peft is not None:
        name = result.peft.get("base_model_name_or_path")
        config = {"task_type": "CAUSAL_LM", **result.peft, "base_model_name_or_path": base or name}
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        _write_json(folder / "adapter_config.json", config)
        return
    save_file(tensors, folder / "adapter.safetensors", {"format": "pt"})
    own = {"format": FORMAT, "kind": result.kind, "settings": result.settings, "base": {"name": base}}
    _write_json(folder / "tunesmith.json", own)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises Refused."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise Refused(f"{path}: larger than {MAX_JSON >> 20} MiB")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path}: not readable as JSON ({str(error)[:80]})") from None
    if not isinstance(value, dict):
        raise Refused(f"{path}: should hold a JSON object")
    return value


def facts(folder: Path) -> dict[str, Any]:
    """What LitGPT wrote beside a checkpoint: `key: value` lines of its YAML files, and lit_config.json."""
    found: dict[str, Any] = {}
    if (folder / "lit_config.json").is_file():
        found |= read_json(folder / "lit_config.json")
    for name in ("model_config.yaml", "hyperparameters.yaml"):
        path = folder / name
        if path.is_file() and path.stat().st_size <= MAX_JSON:
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                if match := re.fullmatch(r"(\w+): *(\S+)\s*", line):
                    words = {"true": True, "false": False, "null": None}
                    number = re.fullmatch(r"-?\d+(\.\d*)?", match[2])
                    found[match[1]] = float(match[2]) if number else words.get(match[2], match[2])
    return found


def main(words: list[str] | None = None, read: Reader = read) -> int:
    """Convert; returns 0, or 2 after one line that says what is refused and why. `read` opens the pickles."""
    words = sys.argv[1:] if words is None else words
    try:
        if words[:1] == ["--child"]:
            return _child(Path(words[1]), Path(words[2]))
        given = _parser().parse_args(words)
        if given.out.exists():
            raise Refused(f"{given.out}: is there already; give a folder to make")
        source = find(given.source)
        with tempfile.TemporaryDirectory() as keep:
            files = dict(read(source, Path(keep)))
        converters: dict[str, Callable[[], Result]] = {
            "peft": lambda: convert_peft(source, files["model"]),
            "lit": lambda: convert_lit(files["model"], facts(source.folder), given),
            "pyreft": lambda: convert_pyreft(files, read_json(source.folder / "config.json"), given),
        }
        result = converters[source.kind]()
        write(result, given.out, given.base)
    except Refused as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    sys.stderr.writelines(f"note: {note}\n" for note in result.notes)
    sys.stdout.write(f"{given.out}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder to make")
    parser.add_argument("--base", metavar="NAME", help="the base model's name or path, for those who load the adapter")
    lit = parser.add_argument_group(
        "Lit-LLaMA and LitGPT", "what LitGPT wrote beside the checkpoint is read from there"
    )
    lit.add_argument("--alpha", type=float, help="LoRA's alpha, which the file does not hold (their scripts: 16)")
    lit.add_argument("--heads", type=int, help="attention heads of the base")
    lit.add_argument("--kv-heads", type=int, help="key/value heads of the base; as many as --heads without it")
    lit.add_argument("--head-dim", type=int, help="width of a head; the hidden size over --heads without it")
    lit.add_argument("--qkv", help="which of q,k,v have a LoRA, such as q,v; needed where the file does not say")
    lit.add_argument("--lit-gpt-2023", action="store_true", help="LoRA by Lit-GPT before its pull request 900")
    lit.add_argument("--before-0.5.5", dest="before_055", action="store_true", help="an adapter by LitGPT before 0.5.5")
    reft = parser.add_argument_group("pyreft", "positions and sharing are not in its files")
    reft.add_argument("--positions", help="as in training: f7+l7, f1, l5")
    reft.add_argument("--share-weights", action="store_true", help="first and last positions shared their weights")
    reft.add_argument("--layers", type=int, help="how many layers the base has")
    return parser


def _child(path: Path, out: Path) -> int:
    """What the child process does: a pickle's tensors as safetensors, within limits."""
    _limit(MEMORY + 4 * path.stat().st_size)
    try:
        save_file(open_pickle(path), out)
    except Refused:
        raise
    except Exception as error:  # whatever a damaged or hostile pickle raises
        raise Refused(_why(error)) from None
    return 0


def _limit(extra: int) -> None:
    """Let this process take `extra` bytes more than it has, and SECONDS of a processor."""
    try:
        import resource
    except ImportError:  # not on Windows: the parent's limit on time remains
        return
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    status = Path("/proc/self/statm")
    if status.is_file():
        has = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (has + extra, has + extra))


def _why(error: Exception) -> str:
    """What a pickle that was not read is refused for."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return "needs more memory than an adapter of its size would"
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"holds more than tensors ({named[1][:80]}), so it is not opened"
    return f"not a file of tensors that torch saved ({type(error).__name__}: {text[:120]})"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
