"""The public face of Tunesmith, for Python and for the command line.

import tunesmith as ts

loaded = ts.load("smollm2-135m-instruct")
ts.attach(loaded, "lora", rank=8)
run = ts.train(loaded, data="movie-reviews", epochs=1, metrics=["accuracy"])
assert ts.verify(run.folder)["ok"]
print(ts.generate(loaded, "Classify the sentiment of the text as negative or positive.\\n\\nA joy.")["text"])

again = ts.load(run.folder)                     # base and adapter, with the template it was trained with
print(ts.generate(again, "...")["text"])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith import adapters as methods
from tunesmith import inference
from tunesmith.adapters import Adapter
from tunesmith.adapters.peft_format import AdapterInfo, adapter_folder, load_adapter, read_info
from tunesmith.config import ModelSection, QuantSection, load_run, validate_section
from tunesmith.data.encode import encode_prompt
from tunesmith.data.schemas import chat_row
from tunesmith.data.segments import Template
from tunesmith.errors import AdapterError, ConfigError, did_you_mean
from tunesmith.inference.sample import GenerationSettings
from tunesmith.inference.templates import base_template, saved_template
from tunesmith.model.as_stored import hold_as_stored
from tunesmith.model.quantize import quant_of, spec_of
from tunesmith.plan import plan_run, preview_data
from tunesmith.prepare import Loaded, load_base
from tunesmith.quant.storage import Spec
from tunesmith.scratch import base_in
from tunesmith.vision.open import open_image, with_images
from tunesmith.workflow import Outcome, train_run

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.export.subject import Subject

__all__ = [
    "Loaded",
    "Outcome",
    "attach",
    "chat",
    "combine",
    "evaluate",
    "export",
    "generate",
    "load",
    "merge",
    "plan_run",
    "preview_data",
    "train",
    "train_run",
    "verify",
]


def load(
    name: str | Path | None = None,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    quant: str | Mapping[str, Any] | None = None,
    as_stored: bool = False,
) -> Loaded:
    """Load a base model (catalog or hub name, folder, .gguf), a run folder or an adapter folder with its base.

    `adapter`: a path, or several by name. Tokenizer and template are checked against those the adapter was trained
    with; `auto` is the precision that a run was trained in. `quant`: kind or settings of section quant; None is what
    the adapter was trained on. `as_stored`: on a CPU, a GGUF file's weights stay in their few bits, which answers
    faster and cannot be trained or merged. Raises CatalogError, ModelError, TokenizerError, AdapterError.
    """
    named = {"default": Path(adapter)} if isinstance(adapter, str | Path) else _paths(adapter)
    if name is not None and (own := adapter_folder(Path(name))) is not None:
        named = {"default": own, **named}
        name = None
    loaded, infos = load_for(name, named, revision=revision, dtype=dtype, device=device, quant=quant)
    for key, info in infos.items():
        loaded.adapters[key] = load_adapter(info.folder, loaded.model, key, identity=loaded.identity)
        template = saved_template(info, loaded.tokenizer, loaded.name)
        if template is not None:
            loaded.templates[key] = template
    changed = [key for key, adapter in loaded.adapters.items() if adapter.base]
    if changed and len(loaded.adapters) > 1:
        raise AdapterError(
            f"--adapter {changed[0]}: its method trained the base's own weights, so no other adapter fits beside it; "
            "load it alone"
        )
    if as_stored:
        hold_as_stored(loaded.model, loaded.path, [key for each in loaded.adapters.values() for key in each.base])
    loaded.model.eval()
    return loaded


def load_for(
    name: str | Path | None,
    adapters: Mapping[str, Path],
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quant: str | Mapping[str, Any] | None = None,
) -> tuple[Loaded, dict[str, AdapterInfo]]:
    """Load the base alone that these adapters (runs or adapter folders) act on, and read what each says of itself.

    `name` is the base; None: the one that they name. The rest is as for `load`.
    """
    infos = {key: read_info(adapter_folder(path) or path) for key, path in adapters.items()}
    base = str(name) if name is not None else _base_of(infos)
    trained = _trained_as(adapters)
    if trained is not None:
        dtype = trained.dtype if dtype == "auto" else dtype
        revision = revision or (trained.revision if trained.path == base else None)
    section = ModelSection(path=base, revision=revision, dtype=dtype, device=device)  # type: ignore[arg-type]
    return load_base(section, _quant(quant, infos)), infos


def attach(loaded: Loaded, kind: str = "lora", name: str = "default", *, seed: int = 0, **settings: Any) -> Adapter:
    """Attach a fresh adapter of method `kind` under `name`. Raises ConfigError, AdapterError."""
    adapter = methods.attach(loaded.model, {"kind": kind, **settings}, name, seed, loaded.tokenizer.encode)
    loaded.adapters[name] = adapter
    return adapter


def train(loaded: Loaded, data: str | Path, *, console: Console | None = None, **settings: Any) -> Outcome:
    """Train the adapter "default" of `loaded` on `data` and verify what was saved.

    `settings` are keys of the configuration, flat or dotted by a double underscore: `epochs=2`, `metrics=["accuracy"]`,
    `train__batch_size=8`. Raises ConfigError, DataError, NumericalError, VerificationError.
    """
    if "default" not in loaded.adapters:
        raise ConfigError('train: nothing is attached; call attach(loaded, "lora") first')
    adapter = loaded.adapters["default"]
    flags = {_SHORT.get(key, key.replace("__", ".")): value for key, value in settings.items()}
    attention = loaded.model.pattern and {"model.attention": dict(loaded.model.pattern.settings)}
    run, _ = load_run(None, [], {"model.path": loaded.name, "data.train": str(data), **(attention or {}), **flags})
    run = replace(run, adapter={"kind": adapter.kind, **_settings(adapter)})
    return train_run(run, console or _console(), loaded)


_SHORT = {
    **{key: f"train.{key}" for key in ("epochs", "max_steps", "batch_size", "learning_rate", "schedule", "seed")},
    **{key: f"data.{key}" for key in ("template", "cutoff", "limit", "instruction", "valid", "valid_size")},
    **{key: f"evaluate.{key}" for key in ("metrics", "best", "samples", "every_steps")},
}


def generate(
    loaded: Loaded,
    prompt: str,
    *,
    use: str | None = None,
    system: str | None = None,
    image: str | Path | bytes | None = None,
    on_text: Callable[[str], None] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Answer one prompt, about an image if there is one; see `generate_all`."""
    return generate_all(loaded, [prompt], use=use, system=system, images=[image], on_text=on_text, **settings)[0]


def generate_all(
    loaded: Loaded,
    prompts: Sequence[str],
    *,
    use: str | None = None,
    system: str | None = None,
    images: Sequence[str | Path | bytes | None] = (),
    on_text: Callable[[str], None] | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Answer all prompts in one batch; an answer is {"text", "finish_reason", "tokens"}.

    `use` names an adapter, or "base"; `images`: one or None for each prompt, a path, bytes or a data URL; `on_text`
    takes the text as it comes, so give it one prompt. `settings` are GenerationSettings. Raises GenerationError,
    AdapterError, TemplateError, DataError.
    """
    active = choose(loaded, use)
    template = template_of(loaded, active)
    messages = [{"role": "system", "content": system}] if system else []
    rows = [chat_row([*messages, {"role": "user", "content": prompt}], "prompt") for prompt in prompts]
    rows = with_images(rows, images, loaded.model.needs(_in_seams(loaded, active)).looks)
    stop = (*tuple(settings.pop("stop", ()) or ()), *template.stop)
    answers = inference.generate(
        loaded.model,
        [encode_prompt(row, template, loaded.tokenizer) for row in rows],
        GenerationSettings().changed(**settings, stop=stop),
        eos_ids=loaded.tokenizer.eos_ids,
        tokenizer=loaded.tokenizer,
        adapters=_in_seams(loaded, active),
        on_text=None if on_text is None else lambda _, text: on_text(text),
    )
    return [{"text": a.text, "finish_reason": a.finish_reason, "tokens": len(a.ids)} for a in answers]


def chat(loaded: Loaded, *, use: str | None = None, console: Console | None = None, **settings: Any) -> None:
    """Talk in the terminal until the user leaves; `image`: about this one."""
    from tunesmith.inference.chat import run_chat

    system, image = settings.pop("system", None), settings.pop("image", None)
    active = choose(loaded, use)
    seams = _in_seams(loaded, tuple(loaded.adapters))
    templates = {key: template_of(loaded, (key,)) for key in seams}
    base_template = template_of(loaded, () if seams else active)
    active = _in_seams(loaded, active)
    run_chat(
        loaded.model,
        loaded.tokenizer,
        base_template,
        templates=templates,
        adapter=active[0] if active else None,
        settings=GenerationSettings().changed(**settings),
        system=system,
        picture=None if image is None else open_image(image, "--image"),
    )


def choose(loaded: Loaded, use: str | None) -> tuple[str, ...]:
    """The adapters that act for `use`: the named one, the first attached, or none for "base". Raises AdapterError."""
    if use is None:
        return tuple(loaded.adapters)[:1]
    if use == "base":
        if changed := [key for key, adapter in loaded.adapters.items() if adapter.base]:
            raise AdapterError(
                f"--use base: {changed[0]} ({loaded.adapters[changed[0]].kind}) changed the base's own weights; load "
                "the base by itself"
            )
        return ()
    if use not in loaded.adapters:
        known = ", ".join([*loaded.adapters, "base"])
        raise AdapterError(
            f"--use {use}: no adapter has this name{did_you_mean(use, loaded.adapters)} (there are {known})"
        )
    return (use,)


def acting(loaded: Loaded, use: str | None = None) -> tuple[Template, tuple[str, ...]]:
    """The template that `use` is asked with, and the adapters in seams that then act. Raises AdapterError."""
    active = choose(loaded, use)
    return template_of(loaded, active), _in_seams(loaded, active)


def _in_seams(loaded: Loaded, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those that sit in the model's seams; a method that trained base weights acts by having changed them."""
    return tuple(name for name in names if loaded.adapters[name].deltas)


def template_of(loaded: Loaded, active: tuple[str, ...]) -> Template:
    """The template an adapter was trained with; for the bare base its own chat template, else plain text."""
    if active and active[0] in loaded.templates:
        return loaded.templates[active[0]]
    if loaded.template is not None and active:
        return loaded.template
    return base_template(loaded.tokenizer)


def verify(path: str | Path, *, base: str | None = None) -> dict[str, Any]:
    """Check a run, or any adapter folder with its base; returns {"ok", "checks": [{"name", "ok", "detail"}]}."""
    return verify_path(Path(path), base=base)


def verify_path(path: Path, *, base: str | None = None) -> dict[str, Any]:
    """`verify`, as the command line calls it."""
    from tunesmith.export import verify as verification

    return verification.verify_path(path, base).to_dict()


def merge(target: str | Path, *, base: str | None = None, out: str | Path, **how: Any) -> dict[str, Any]:
    """Fold an adapter into its base and write a Hugging Face folder; returns what survived rounding.

    `how`: `dtype`, `force`, and `onto`, the 16-bit base of a quantized one. Raises CannotMerge, VerificationError.
    """
    from tunesmith.export.onto import merge_subject

    return merge_subject(_subject(target, base, adapted=True), Path(out), **how)


def export(target: str | Path, *, to: str, out: str | Path, base: str | None = None, **options: Any) -> dict[str, Any]:
    """Write a run, an adapter or a model as `to` says (see export/formats.py); returns what was checked of it."""
    from tunesmith.export.formats import Options, export_subject

    return export_subject(_subject(target, base), to, Path(out), Options(**options))


def _subject(target: str | Path, base: str | None, adapted: bool = False) -> Subject:
    """An adapter on its base, as it was trained but in float32, or a model, unless it must be `adapted`."""
    from tunesmith.export.subject import Subject

    folder = adapter_folder(Path(target))
    if folder is None and (base is not None or adapted):
        raise AdapterError(f"{target}: holds no adapter (adapter_config.json); give a run folder or an adapter folder")
    loaded = load(target if base is None else base, dtype="float32", adapter=None if base is None else folder)
    info = None if folder is None else read_info(folder)
    own = loaded.adapters.get("default"), info, loaded.templates.get("default")
    return Subject(loaded.model, loaded.tokenizer, loaded.name, loaded.path, loaded.identity, *own)


def combine(parts: Mapping[str, float], *, base: str | None = None, out: str | Path) -> dict[str, Any]:
    """Write the weighted sum of adapters (folder: weight) as one adapter folder; returns what was checked of it.

    For LoRA and BitFit. Raises AdapterError for other methods, VerificationError.
    """
    from tunesmith.export.combine import write_combined

    paths = {f"part{number}": path for number, path in enumerate(parts, 1)}
    loaded = load(base, adapter=paths, dtype="float32")
    return write_combined(
        loaded.model,
        loaded.adapters,
        dict(zip(paths, parts.values(), strict=True)),
        {key: read_info(adapter_folder(Path(path)) or Path(path)) for key, path in paths.items()},
        Path(out),
        base=loaded.path,
        tokenizer=loaded.tokenizer,
        identity=loaded.identity,
        named=loaded.name,
    )


def evaluate(
    target: str | Path,
    *,
    base: str | None = None,
    use: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    items: Path | None = None,
    console: Console | None = None,
    **asked: Any,
) -> dict[str, Any]:
    """Measure a run, an adapter or a model.

    `asked`: `data`, `metrics`, `split` and `rows` (a run has its own data), `tasks` as "NAME=PATH" with `settings` as
    "NAME.KEY=VALUE", `harness`: see evaluation.py. `use`: an adapter, or "base". `items`: a file for a line about every
    item of the tasks. Raises ConfigError, DataError before the model is loaded.
    """
    from tunesmith.evaluate.subject import Subject as Measured
    from tunesmith.evaluation import read_evaluation

    evaluation = read_evaluation(Path(target), **asked)
    adapter = target if adapter_folder(Path(target)) is not None else None
    loaded = load(target if adapter is None else base, adapter=adapter, dtype=dtype, device=device)
    template, adapters = acting(loaded, use)
    measured = Measured(loaded.model, loaded.tokenizer, template, adapters=adapters)
    return evaluation.measure(measured, partial((console or _console()).print, markup=False, soft_wrap=True), items)


def _trained_as(adapters: Mapping[str, Path]) -> ModelSection | None:
    """The model section of the only run among these folders."""
    configs = {folder / "config.yaml" for path in adapters.values() for folder in (path, path.parent)}
    found = [path for path in configs if path.is_file()]
    return load_run(found[0])[0].model if len(found) == 1 and len(adapters) == 1 else None


def _paths(adapters: Mapping[str, str | Path] | None) -> dict[str, Path]:
    return {key: Path(path) for key, path in (adapters or {}).items()}


def _quant(asked: str | Mapping[str, Any] | None, infos: Mapping[str, AdapterInfo]) -> Spec | None:
    """How to hold the base's linears: as asked, else as all of these adapters knew them, else dense."""
    if asked is not None:
        said = {"kind": asked} if isinstance(asked, str) else dict(asked)
        return spec_of(validate_section(QuantSection, said, "quant"))
    known = {quant_of(info.identity, str(info.folder)) for info in infos.values()}
    return known.pop() if len(known) == 1 else None


def _base_of(infos: Mapping[str, AdapterInfo]) -> str:
    """The base that the adapters name. Raises ConfigError where they name none, or different ones."""
    named = {base_in(info.folder.parent) or info.base for info in infos.values()}
    bases = {str(base) for base in named if base}
    if len(bases) != 1:
        found = f"they name {', '.join(sorted(bases))}" if bases else "none is named"
        raise ConfigError(f"which base model? {found}; say it with --model (or --base)")
    return bases.pop()


def _settings(adapter: Adapter) -> dict[str, Any]:
    from pydantic import TypeAdapter

    plain: dict[str, Any] = TypeAdapter(type(adapter.settings)).dump_python(adapter.settings, mode="json")
    return plain


def _console() -> Console:
    from rich.console import Console as RichConsole

    return RichConsole(stderr=True, highlight=False)
