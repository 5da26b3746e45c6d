"""`tunesmith train`, from a configuration to a verified run folder:

prepare -> plan memory -> [measure, sample] -> train -> best checkpoint -> save adapter -> verify -> [measure, sample]
-> report
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import tunesmith
from tunesmith.adapters import Adapter
from tunesmith.adapters.peft_format import save_adapter
from tunesmith.compare.report import write_report
from tunesmith.config import Run
from tunesmith.data.encode import Example, Prompt, encode_prompt
from tunesmith.errors import ConfigError
from tunesmith.evaluate.forgetting import general_metrics, general_sets, with_forgetting
from tunesmith.evaluate.language_model import language_model_metrics
from tunesmith.evaluate.run import find_metric, measure
from tunesmith.evaluate.subject import Subject
from tunesmith.evaluate.trained import unknown_labels
from tunesmith.export.replay import fresh_process
from tunesmith.export.verify import verify_run, write_probe
from tunesmith.files import atomic_folder, atomic_write_json, atomic_write_text
from tunesmith.folders import as_begun, run_folder
from tunesmith.footprint import chosen, with_choice, work_of
from tunesmith.inference.generate import generate
from tunesmith.inference.sample import GenerationSettings
from tunesmith.model import allocator
from tunesmith.model.native import select
from tunesmith.model.quantize import held_weights
from tunesmith.prepare import (
    Data,
    Loaded,
    attach_adapter,
    base_for,
    check_images,
    check_precision,
    load_data,
    resolve,
    run_fingerprint,
    settle_optimizer,
    show_report,
    template_for,
)
from tunesmith.scratch import check_trains_all
from tunesmith.train.checkpoint import seed_everything
from tunesmith.train.guards import check_prompts, check_tokenizer_ids, explain_nonfinite
from tunesmith.train.log import MetricsFile, Progress, check_trackers, open_trackers
from tunesmith.train.loop import Trainer, read_checkpoint
from tunesmith.train.memory import GIB, give_back_memory, peak_memory
from tunesmith.train.planner import MemoryPlan
from tunesmith.train.reporter import RunLog
from tunesmith.train.steps import Plan, make_plan
from tunesmith.vision.open import look_all

if TYPE_CHECKING:
    from rich.console import Console

SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class Outcome:
    """What a finished run has to show: its folder, and the measures before and after."""

    folder: Path
    before: Mapping[str, float]
    after: Mapping[str, float]
    samples: Sequence[Mapping[str, str]]
    checks: Sequence[str]
    seconds: float


def train_run(run: Run, console: Console, loaded: Loaded | None = None) -> Outcome:
    """Carry out `run`, on a base that is `loaded` already if given.

    Raises TunesmithError, and VerificationError if what was saved is not what was trained.
    """
    began = time.perf_counter()
    folder, checkpoint = run_folder(run)
    if checkpoint is not None:
        run = as_begun(run, folder)
    _check_names(run)
    general = general_sets(run.evaluate.general, run.evaluate.general_items)
    kernels, which = select(run.train.kernels)
    malloc = allocator.use(kernels == "native")
    loaded = base_for(run, folder, loaded, checkpoint is not None)
    loaded.template = template_for(run, loaded.tokenizer)
    data = replace(load_data(run, loaded.tokenizer, loaded.template), general=general)
    _check_data(run, loaded, data, console)
    adapter = loaded.adapters.get("default") or attach_adapter(run, loaded)
    check_precision(adapter)
    check_trains_all(run.model, loaded.model, adapter)
    look_all([row.picture for row in _all_rows(data)], loaded.model.needs((adapter.name,)).looks)
    if line := check_prompts(adapter.kind, loaded.model.needs((adapter.name,)), data.train.examples):
        _say(console, f"train: {line}")
    run, swapped = settle_optimizer(run, loaded.model.device)
    choice = chosen(work_of(run, data.train.examples, loaded.tokenizer.encode, loaded.path))
    planned = choice.memory
    for line in (which, *([malloc] if malloc else ()), *swapped, choice.why, *planned.lines()):
        _say(console, line)
    run = resolve(with_choice(replace(run, name=folder.name), choice), loaded, kernels)
    plan = _steps(run, adapter, data)
    trainable = sum(p.numel() for p in adapter.trainable.values())
    total = sum(p.numel() for p in loaded.model.parameters() if p.is_floating_point())
    total += held_weights(loaded.model)
    _say(console, f"{adapter.kind}: {trainable:,} trainable of {total:,} parameters ({trainable / total:.2%})")
    if checkpoint is None:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / "config.yaml", run.dump_yaml())
    before, shown = _before(run, loaded, data, folder, checkpoint, console)
    after = _train(run, plan, loaded, adapter, data, before, folder, checkpoint, console)
    give_back_memory()  # the optimizer's, before the base is read again for verification
    samples = _answers(run, loaded, data, shown, "after")
    with fresh_process() as child:  # it starts while the adapter is saved
        save_run_adapter(run, loaded, adapter, data, folder)
        report = verify_run(folder, base=loaded.path, child=child)
    seconds = time.perf_counter() - began
    checks = [f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}" for check in report.checks]
    outcome = Outcome(folder, before, after, samples, checks, seconds)
    peak = peak_memory(loaded.model.device)
    write_report(
        folder, samples=samples, before=before, after=after, facts=_facts(outcome, run, planned, peak, trainable)
    )
    _say(console, planned.lines(peak)[0])
    report.raise_if_failed()
    return outcome


def _say(console: Console, line: str) -> None:
    """A line as it is: whatever the width, and whatever looks like markup in it."""
    console.print(line, markup=False, soft_wrap=True)


def _check_names(run: Run) -> None:
    """Raise ConfigError for a metric or a tracker that is not there, before anything is loaded."""
    for metric in (*run.evaluate.metrics, run.evaluate.best):
        find_metric(metric)
    check_trackers(run.log.report_to)


def _check_data(run: Run, loaded: Loaded, data: Data, console: Console) -> None:
    """Say what is odd about tokenizer and data. Raises TokenizerError, ConfigError for measures without rows."""
    config = loaded.model.config
    for line in check_tokenizer_ids(loaded.tokenizer, config.vocab_size, config.eos_token_ids, config.bos_token_id):
        _say(console, f"tokenizer: {line}")
    show_report(data, console, loaded.model.pattern)
    if lost := unknown_labels(data.valid_rows, data.labels):
        _say(
            console,
            f"valid: {len(lost):,} of {len(data.valid_rows):,} rows have a label that is not among the training's "
            f"(first {lost[0].label!r}: {lost[0].source}); no answer to them can be right",
        )
    check_images(run, data, console)
    evaluate = run.evaluate
    asked = {"metrics": evaluate.metrics, "patience": evaluate.patience, "general": evaluate.general}
    for key, value in asked.items():
        if value and data.valid is None:
            raise ConfigError(
                f"evaluate.{key}: there are no held-out rows to measure on; give data.valid, or data.valid_size"
            )


def _all_rows(data: Data) -> list[Example]:
    """Training and held-out rows."""
    return [*data.train.examples, *(data.valid.examples if data.valid else ())]


def _steps(run: Run, adapter: Adapter, data: Data) -> Plan:
    """The run's arithmetic in optimizer steps. Raises ConfigError for a warm-up that never ends."""
    return make_plan(
        run.train,
        len(data.train.examples),
        learning_rate=run.train.learning_rate or adapter.method.learning_rate,
        pack_tokens=run.train.pack_tokens or 1,
        dropout=bool(getattr(adapter.settings, "dropout", 0.0)),
        eval_steps=run.evaluate.every_steps,
    )


def _facts(outcome: Outcome, run: Run, planned: MemoryPlan, peak: int, trainable: int) -> dict[str, str]:
    """What the report says of the run in a table."""
    return {
        "base": run.model.path,
        "data": run.data.train,
        "method": str(run.adapter["kind"]),
        "trained parameters": f"{trainable:,}",
        "seconds, all included": f"{outcome.seconds:.0f}",
        "peak memory, GiB": f"{peak / GIB:.2f} (planned {planned.total / GIB:.2f})",
        "verified": "; ".join(outcome.checks),
    }


def _train(
    run: Run,
    plan: Plan,
    loaded: Loaded,
    adapter: Adapter,
    data: Data,
    before: Mapping[str, float],
    folder: Path,
    checkpoint: Path | None,
    console: Console,
) -> dict[str, float]:
    """Run the loop to its end, leave the best parameters in the model, and return their measures."""
    settings = run.train
    if settings.share_prefix and not plan.share_prefix:
        _say(
            console,
            "dropout is on, so each example draws its own: prefixes are not shared, which costs their tokens again",
        )
    fingerprint, start = run_fingerprint(run, loaded, data), 0
    if checkpoint is not None:
        read_checkpoint(checkpoint, fingerprint)  # refused before metrics.jsonl is cut to its step
        start = int(checkpoint.name.rpartition("-")[2])
    trackers = open_trackers(
        run.log.report_to,
        project=run.log.project,
        name=run.log.name or folder.name,
        folder=folder,
        config=run.to_dict(),
        resume_step=start,
    )
    metrics = MetricsFile(folder / "metrics.jsonl", resume_step=start)
    seed_everything(settings.seed)
    with RunLog(metrics, Progress(plan.steps, start_step=start, console=console), trackers, loaded.model.device) as log:
        trainer = Trainer(
            loaded.model,
            adapter,
            data.train.examples,
            settings,
            plan,
            folder,
            log,
            evaluator=None
            if data.valid is None
            else lambda: with_forgetting(_measure(run, loaded, data, step=trainer.progress.step), before),
            best_metric=run.evaluate.best,
            higher_is_better=find_metric(run.evaluate.best).higher_is_better,
            patience=run.evaluate.patience,
            fingerprint=fingerprint,
        )
        if checkpoint is not None:
            trainer.resume(checkpoint)
            what = "its training had ended, so only its end is made again: save, verify, report"
            what = what if trainer.finished else f"{plan.steps - trainer.progress.step} steps to go"
            log.say(f"resumed from {checkpoint} at step {trainer.progress.step} of {plan.steps}: {what}")
        trainer.run()
        step = trainer.load_best()
        if step != trainer.progress.step:
            log.say(f"best {run.evaluate.best} was at step {step}: that checkpoint is saved as the adapter")
    measured = [found for found in trainer.progress.evaluations if found["step"] == step]
    return {key: value for key, value in measured[-1].items() if key != "step"} if measured else {}


def subject_of(run: Run, loaded: Loaded, data: Data, adapters: tuple[str, ...] | None = None) -> Subject:
    """The run's held-out rows under the model, for the metrics."""
    if data.valid is None or loaded.template is None:
        raise ConfigError("evaluation needs held-out rows: give data.valid, or data.valid_size")
    return Subject(
        loaded.model,
        loaded.tokenizer,
        loaded.template,
        data.valid_rows,
        data.valid.examples,
        data.labels,
        adapters,
        run.train.pack_tokens or 4096,
    )


def _measure(
    run: Run, loaded: Loaded, data: Data, adapters: tuple[str, ...] | None = None, step: int = 0
) -> dict[str, float]:
    """The measures asked for, on the held-out rows. Raises NumericalError for a loss that is not finite."""
    if data.valid is None:
        return {}
    names = dict.fromkeys(("eval_loss", *run.evaluate.metrics, run.evaluate.best))
    subject = subject_of(run, loaded, data, adapters)
    measured = measure(subject, list(names))
    if math.isfinite(measured["eval_loss"]):
        return measured | general_metrics(subject, data.general)

    def forward(rows: Sequence[Example]) -> None:
        language_model_metrics(loaded.model, rows, budget=subject.budget, adapters=adapters)

    what, stopped = f"the held-out loss is {measured['eval_loss']}", "no checkpoint of it was saved"
    raise explain_nonfinite(what, step, loaded.model, subject.examples, forward, stopped)


def _before(
    run: Run, loaded: Loaded, data: Data, folder: Path, checkpoint: Path | None, console: Console
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Measures and samples of the bare base; a resumed run has them from its start."""
    kept = folder / "before.json"
    if checkpoint is not None and kept.is_file():
        stored = json.loads(kept.read_text(encoding="utf-8"))
        return stored["measured"], stored["samples"]
    measured = _measure(run, loaded, data, adapters=())
    if measured:
        _say(console, "before: " + ", ".join(f"{key} {value:.4f}" for key, value in measured.items()))
    samples = _answers(run, loaded, data, [], "before", adapters=())
    atomic_write_json(kept, {"measured": measured, "samples": samples})
    return measured, samples


def _answers(
    run: Run,
    loaded: Loaded,
    data: Data,
    known: list[dict[str, str]],
    when: str,
    adapters: tuple[str, ...] | None = None,
) -> list[dict[str, str]]:
    """Greedy answers to the first held-out rows, added to what is known of these rows under the key `when`."""
    rows = [row for row in data.valid_rows if row.kind != "text"][: run.evaluate.samples]
    if not rows or loaded.template is None:
        return known
    template, tokenizer = loaded.template, loaded.tokenizer
    answers = generate(
        loaded.model,
        [encode_prompt(row, template, tokenizer) for row in rows],
        GenerationSettings(max_new_tokens=SAMPLE_TOKENS, stop=template.stop),
        eos_ids=tokenizer.eos_ids,
        tokenizer=tokenizer,
        adapters=adapters,
    )
    known = known or [
        {"prompt": row.fields.get("prompt") or row.turns[-2].text, "expected": row.turns[-1].text} for row in rows
    ]
    return [{**entry, when: answer.text} for entry, answer in zip(known, answers, strict=True)]


def save_run_adapter(run: Run, loaded: Loaded, adapter: Adapter, data: Data, folder: Path) -> None:
    """Write RUN/adapter and the probe that verification holds a fresh load against."""
    if loaded.template is None:
        raise ConfigError("data.template: an adapter is saved with the template it was trained with")
    with atomic_folder(folder / "adapter") as target:
        save_adapter(
            target,
            adapter,
            base=loaded.name,
            identity=loaded.identity,
            template=loaded.template.to_dict(),
            tokenizer=loaded.tokenizer.fingerprint(),
            notes=_notes(run, data),
            attention=loaded.model.pattern.settings if loaded.model.pattern else None,
        )
        loaded.tokenizer.save(target)
    # Rows with an image first: an adapter may do nothing without one.
    examples = sorted((data.valid or data.train).examples, key=lambda example: example.picture is None)
    write_probe(folder, loaded.model, [Prompt(e.ids.tolist(), e.picture) for e in examples[:4]])


def _notes(run: Run, data: Data) -> dict[str, Any]:
    return {
        "data": run.data.train,
        "data_sha256": data.fingerprint,
        "rows": data.train.report.rows,
        "learning_rate": run.train.learning_rate,
        "epochs": run.train.epochs,
        "batch_size": run.train.batch_size,
        "tunesmith": tunesmith.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }
