"""One row of the page of methods, in a process of its own: train, save, measure, answer, fold, and tell all of it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.children.common import spec, tell, timed
from bench.children.trial import Bench, attach, prepare, train
from tunesmith.data.encode import encode_prompt
from tunesmith.errors import CannotMerge, NumericalError, TunesmithError
from tunesmith.evaluate.classification import predict_labels
from tunesmith.evaluate.run import measure
from tunesmith.evaluate.subject import Subject
from tunesmith.export.merge import merged_weights
from tunesmith.inference.generate import generate
from tunesmith.inference.sample import GenerationSettings
from tunesmith.model.llama import Llama
from tunesmith.train.memory import peak_memory
from tunesmith.workflow import save_run_adapter, subject_of

PROMPTS, NEW_TOKENS, REPEATS = 32, 16, 3  # of the latencies
SAMPLES, SAMPLE_TOKENS = 2, 24


def main() -> None:
    """Carry out the row of the specification and tell."""
    tell("row", **attempt(spec(), peak_memory()))


def attempt(wanted: Mapping[str, Any], imports: int) -> dict[str, Any]:
    """The row's figures, or {"diverged": why}, or {"error": why}."""
    try:
        return carry_out(wanted, imports)
    except NumericalError as error:
        return {"diverged": str(error)}
    except TunesmithError as error:
        return {"error": str(error)}


def carry_out(wanted: Mapping[str, Any], imports: int) -> dict[str, Any]:
    """All figures of one row; `imports` is the memory that this process had before it loaded anything."""
    bench = prepare(wanted)
    if wanted["adapter"] is None:
        return {**measured(bench), "peak_bytes": peak_memory(), "imports_bytes": imports}
    began = time.perf_counter()
    attach(bench, wanted["adapter"])
    attach_s = time.perf_counter() - began
    done = train(bench, wanted["rate"])
    memory = {"attach_s": attach_s, "peak_bytes": peak_memory(), "imports_bytes": imports}
    adapter = bench.loaded.adapters["default"]
    parameters = sum(parameter.numel() for parameter in adapter.trainable.values())
    found = {**done, **memory, "parameters": parameters, "file_bytes": saved(bench), **measured(bench)}
    return {**found, **merged(bench)}


def saved(bench: Bench) -> int:
    """Save the adapter as a run does; returns the bytes of its tensors' files. Raises AdapterError, DiskError."""
    with tempfile.TemporaryDirectory() as scratch:
        save_run_adapter(bench.run, bench.loaded, bench.loaded.adapters["default"], bench.data, Path(scratch))
        return sum(file.stat().st_size for file in (Path(scratch) / "adapter").rglob("*.safetensors"))


def measured(bench: Bench) -> dict[str, Any]:
    """Loss and accuracy on the held-out rows, latencies, and answers to the first of the rows."""
    subject = subject_of(bench.run, bench.loaded, bench.data)
    known = measure(subject, ["eval_loss", "accuracy"])
    return {
        "loss": known["eval_loss"], "accuracy": known["accuracy"], "interval": known["accuracy_interval"],
        **latencies(bench, bench.loaded.model), "samples": samples(bench),
    }  # fmt: skip


def latencies(bench: Bench, model: Llama) -> dict[str, float]:
    """Milliseconds of scoring one review of a batch for its label, and of one greedy answer of NEW_TOKENS tokens."""
    batch, prompts = few(bench, model), _prompts(bench, 1)
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS)
    return {
        "prompt_ms": _milliseconds(lambda: predict_labels(batch)) / len(batch.rows),
        "greedy_ms": _milliseconds(lambda: generate(model, prompts, settings, eos_ids=())),
    }


def few(bench: Bench, model: Llama) -> Subject:
    """The first held-out rows under `model`."""
    whole = subject_of(bench.run, bench.loaded, bench.data)
    rows, examples = whole.rows[:PROMPTS], whole.examples[:PROMPTS]
    return Subject(model, whole.tokenizer, whole.template, rows, examples, whole.labels, None, whole.budget)


def samples(bench: Bench) -> list[dict[str, str]]:
    """Greedy answers to the first held-out reviews."""
    tokenizer, template = bench.loaded.tokenizer, bench.loaded.template
    answers = generate(
        bench.loaded.model,
        _prompts(bench, SAMPLES),
        GenerationSettings(max_new_tokens=SAMPLE_TOKENS, stop=template.stop if template else ()),
        eos_ids=tokenizer.eos_ids,
        tokenizer=tokenizer,
    )
    rows = bench.data.valid_rows[:SAMPLES]
    said = [(row.fields.get("text") or row.turns[-2].text, row.turns[-1].text) for row in rows]
    return [{"review": text, "label": label, "answer": a.text} for (text, label), a in zip(said, answers, strict=True)]


def merged(bench: Bench) -> dict[str, Any]:
    """Latencies of the model with the adapter folded in, and how far its loss is then off; or why it does not fold."""
    adapter = bench.loaded.adapters["default"]
    if not adapter.deltas:
        return {"not_merged": "it trains the base's own weights"}
    if not adapter.method.mergeable(adapter.settings):
        return {"not_merged": "it does not fold"}
    try:
        model = folded(bench)
    except CannotMerge as error:
        return {"not_merged": str(error)}
    beside, inside = (measure(few(bench, m), ["eval_loss"])["eval_loss"] for m in (bench.loaded.model, model))
    found = {f"merged_{key}": value for key, value in latencies(bench, model).items()}
    return {**found, "merged_loss_off": abs(inside - beside)}


def folded(bench: Bench) -> Llama:
    """A model of plain weights that computes what base and adapter do. Raises CannotMerge."""
    tensors, _, config = merged_weights(bench.loaded.model, bench.loaded.adapters["default"], torch.float32)
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = Llama(config)
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.requires_grad_(False)
    return model.eval()


def _prompts(bench: Bench, count: int) -> list[list[int]]:
    """Ids of the first held-out prompts."""
    template, rows = bench.loaded.template, bench.data.valid_rows[:count]
    return [encode_prompt(row, template, bench.loaded.tokenizer) for row in rows] if template else []


def _milliseconds(work: Callable[[], Any]) -> float:
    """The median time of REPEATS calls, after one that does not count."""
    work()
    times: Sequence[float] = [timed(work) for _ in range(REPEATS)]
    return 1000 * median(times)


if __name__ == "__main__":
    main()
