"""`tunesmith generate` and `chat`: use what was trained."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.methods import MethodFiles, open_files
from tunesmith.cli.shell import app, command, console, out
from tunesmith.errors import ConfigError, DataError, GenerationError

Target = Annotated[
    str | None, typer.Argument(metavar="[RUN|ADAPTER|MODEL]", help="A run folder, an adapter folder, or a model.")
]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Base model; without it, the one an adapter names.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", "-a", metavar="[NAME=]PATH", help="Adapter or run folder; give several to switch."),
]
Use = Annotated[
    str | None, typer.Option("--use", help="Name of the adapter to use, or base; else the first one given.")
]
Image = Annotated[
    Path | None, typer.Option("--image", metavar="FILE", help="Image to talk about, for an adapter that looks at them.")
]
MaxNewTokens = Annotated[int | None, typer.Option("--max-new-tokens", help="Longest answer in tokens.")]
Temperature = Annotated[float | None, typer.Option("--temperature", help="Above 0 samples; 0 takes the likeliest.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Sample among the K likeliest tokens.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Sample among the likeliest that sum to P.")]
MinP = Annotated[float | None, typer.Option("--min-p", help="Sample among those above P times the likeliest.")]
Penalty = Annotated[float | None, typer.Option("--repetition-penalty", help="Above 1 repeats less.")]
Beams = Annotated[int | None, typer.Option("--beams", help="Beam search with N beams.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="Text that ends an answer; may be repeated.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of sampling.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]


@command(app, "generate")
def generate(
    target: Target = None,
    model: Model = None,
    adapter: Adapters = None,
    use: Use = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="What to answer; may be repeated.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="Prompts: a line each, or .jsonl with a prompt a row, and perhaps an image."),
    ] = None,
    image: Image = None,
    system: Annotated[str | None, typer.Option("--system", help="System message, where the template has one.")] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    beams: Beams = None,
    stop: Stop = None,
    seed: Seed = None,
    stream: Annotated[bool | None, typer.Option("--stream/--no-stream", help="Print while generating.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON line for each prompt.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    method_file: MethodFiles = None,
) -> None:
    """Answer prompts from --prompt, --file or stdin, with a model or an adapter and its own template.

    \b
    tunesmith generate runs/NAME --prompt "A film I would see twice."
    tunesmith generate --model M --adapter a=runs/A --adapter b=runs/B --use b --file prompts.txt --json
    """
    settings = given(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, beams=beams, stop=stop or None, seed=seed, system=system,
    )  # fmt: skip
    if stream and (json or (beams or 1) > 1):
        raise GenerationError(f"--stream cannot act with {'--json' if json else '--beams'}; leave one of them out")
    base, adapters = what_to_load(target, model, adapter)
    open_files(method_file)
    prompts, images = read_prompts(prompt or [], file, image)
    live = not json and (beams or 1) == 1 and (sys.stdout.isatty() if stream is None else stream)
    from tunesmith import api

    loaded = api.load(base, dtype=dtype, device=device, adapter=adapters, as_stored=True)
    if live:
        for number, text in enumerate(prompts):
            api.generate(loaded, text, use=use, on_text=_show, **settings, **given(image=images[number]))
            out()
        return
    settings |= {"images": images} if any(each is not None for each in images) else {}
    for text, answer in zip(prompts, api.generate_all(loaded, prompts, use=use, **settings), strict=True):
        out(jsonlib.dumps({"prompt": text, **answer}, ensure_ascii=False, default=str) if json else answer["text"])


@command(app, "chat")
def chat(
    target: Target = None,
    model: Model = None,
    adapter: Adapters = None,
    use: Use = None,
    system: Annotated[str | None, typer.Option("--system", help="System message, where the template has one.")] = None,
    image: Image = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    stop: Stop = None,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    method_file: MethodFiles = None,
) -> None:
    """Talk with a model or an adapter; /help inside lists what can be changed on the way."""
    settings = given(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, stop=stop or None, seed=seed, system=system, image=image,
    )  # fmt: skip
    base, adapters = what_to_load(target, model, adapter)
    open_files(method_file)
    from tunesmith import api

    loaded = api.load(base, dtype=dtype, device=device, adapter=adapters, as_stored=True)
    api.chat(loaded, use=use, console=console(), **settings)


def given(**settings: Any) -> dict[str, Any]:
    """Return the settings that the user gave: defaults belong to the room below, which can then tell conflicts."""
    return {name: value for name, value in settings.items() if value is not None}


def what_to_load(
    target: str | None, model: str | None, adapters: list[str] | None
) -> tuple[str | None, dict[str, str] | None]:
    """Return (base or what names it, adapters by name) from a command's words. Raises ConfigError.

    A target beside --model is an adapter on that base; alone it may be a run, an adapter or a model.
    """
    named: dict[str, str] = {}
    words = [*([target] if target is not None and model is not None else []), *(adapters or [])]
    for word in words:
        name, equals, path = word.partition("=")
        if not equals:
            name, path = ("default" if "default" not in named else Path(word).name), word
        if not name or not path:
            raise ConfigError(f"--adapter {word}: should be NAME=PATH or PATH")
        if name in named or name == "base":
            raise ConfigError(f"--adapter {word}: the name {name!r} is taken; give another as NAME=PATH")
        named[name] = path
    base = model if model is not None else target
    if base is None and not named:
        raise ConfigError("nothing to load: give a run folder, or --model NAME and perhaps --adapter PATH")
    return base, named or None


def read_prompts(
    prompts: list[str], file: Path | None, image: Path | None = None
) -> tuple[list[str], list[Path | bytes | None]]:
    """Return the prompts of --prompt and --file, or else stdin as one, and the image that each is about, or None.

    `image` is that of all that have none of their own. Raises DataError, ConfigError.
    """
    found: list[str] = list(prompts)
    images: list[Path | bytes | None] = [None] * len(found)
    for text, own in _prompts_of(file) if file is not None else ():
        found.append(text)
        images.append(own)
    if not found and file is None:
        if sys.stdin.isatty():
            raise ConfigError("no prompt: give --prompt TEXT, --file PATH, or text on stdin; 'tunesmith chat' talks")
        found = [text] if (text := sys.stdin.read().strip()) else []
    if not found:
        raise DataError(f"{file or 'stdin'}: no prompt in it")
    images += [None] * (len(found) - len(images))
    return found, [image if own is None else own for own in images]


def _prompts_of(file: Path) -> list[tuple[str, Path | bytes | None]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as text ({getattr(error, 'strerror', None) or error})") from None
    if file.suffix != ".jsonl":
        return [(line, None) for line in lines if line.strip()]
    from tunesmith.data.image_field import from_folder, image_of

    prompts: list[tuple[str, Path | bytes | None]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = jsonlib.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f"{file}:{number}: not JSON") from None
        text = row.get("prompt") if isinstance(row, dict) else row
        if not isinstance(text, str):
            raise DataError(f"{file}:{number}: should be a string, or an object with a string 'prompt'")
        own = image_of(row, f"{file}:{number}") if isinstance(row, dict) else None
        prompts.append((text, from_folder(own, file.parent)))
    return prompts


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
