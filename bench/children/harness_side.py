"""One side of bench/harness.py: the local tasks through the library once, by our model class or by its own backend."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import lm_eval
import torch
import transformers
import yaml
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from bench.children.common import spec, tell
from bench.children.prepare import export
from tunesmith import api
from tunesmith.data.catalog import resolve_model
from tunesmith.evaluate.choice import ChoiceSettings
from tunesmith.evaluate.suite import find_task
from tunesmith.files import atomic_write_text
from tunesmith.hardware import describe
from tunesmith.tokenizer import load_tokenizer


def main() -> None:
    """Make the tasks and the model folder where they are not there yet, run the side, and tell."""
    wanted = spec()
    torch.set_num_threads(wanted["threads"])
    work = Path(wanted["work"])
    names = local_tasks(wanted, work / "harness-tasks")
    path = resolve_model(wanted["model"])
    export(path, load_tokenizer(path), work, ["float32"])
    lm, seconds = SIDES[wanted["side"].split(",")[0]](wanted, work / "model-float32"), []
    watch(lm, seconds)
    manager = TaskManager(include_path=str(work / "harness-tasks"), include_defaults=False)
    found = {}
    for task, name in names.items():
        done = lm_eval.simple_evaluate(
            lm,
            tasks=[name],
            num_fewshot=wanted["shots"],
            limit=wanted["items"],
            task_manager=manager,
            bootstrap_iters=0,
        )
        found[task] = {"seconds": seconds.pop(), **choices(done["samples"][name])}
    about = describe()
    versions = {"tunesmith": about["tunesmith"], "commit": about["revision"], "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__, "lm-eval": lm_eval.__version__}
    tell(
        "harness", tasks=found,
        about={"cpu": about["cpu"], "memory": about["memory"], "system": about["system"], "versions": versions},
    )  # fmt: skip


def local_tasks(wanted: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write each task's rows and its YAML; returns the library's name of each."""
    shutil.rmtree(folder, ignore_errors=True)
    names = {}
    for task, file in wanted["files"].items():
        items = find_task(task).read(Path(file), ChoiceSettings())
        lines = [{"query": i.contexts[0], "choices": list(i.choices), "gold": i.answer} for i in items]
        rows = folder / f"{task}.jsonl"
        rows.parent.mkdir(parents=True, exist_ok=True)
        count = wanted["items"]  # what is measured first, then what examples are drawn from
        for part, some in (("test", lines[:count]), ("train", lines[count:] or lines[-count:])):
            text = "".join(json.dumps(line) + "\n" for line in some)
            atomic_write_text(rows.with_suffix(f".{part}.jsonl"), text)
        names[task] = f"local_{task}"
        atomic_write_text(folder / f"{task}.yaml", yaml.safe_dump(definition(names[task], rows)))
    return names


def definition(name: str, rows: Path) -> dict[str, Any]:
    """A multiple-choice task of the library over local rows."""
    files = {part: str(rows.with_suffix(f".{part}.jsonl")) for part in ("test", "train")}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(rows.parent / "cache")},
        "output_type": "multiple_choice",
        "test_split": "test",
        "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n"},
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def ours(wanted: dict[str, Any], folder: Path) -> Any:
    """Our model class."""
    from tunesmith.evaluate.harness import TunesmithLM
    from tunesmith.evaluate.subject import Subject

    loaded = api.load(str(folder), dtype="float32", device="cpu")
    template, adapters = api.acting(loaded, "base")
    return TunesmithLM(Subject(loaded.model, loaded.tokenizer, template, adapters=adapters))


def theirs(wanted: dict[str, Any], folder: Path) -> Any:
    """The library's Hugging Face backend."""
    from lm_eval.models.huggingface import HFLM

    size = int(wanted["side"].split()[-1])
    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=size)


SIDES: dict[str, Callable[[dict[str, Any], Path], Any]] = {"ours": ours, "hf": theirs}


def watch(lm: Any, seconds: list[float]) -> None:
    """Call the model class once for nothing, then note how long each call for log-likelihoods takes."""
    inner = lm.loglikelihood
    pairs = [("A short question first.\nAnswer:", " yes"), ("A short question first.\nAnswer:", " no, not at all")]
    inner([Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs])

    def timed(requests: Any, **options: Any) -> Any:
        began = time.perf_counter()
        found = inner(requests, **options)
        seconds.append(time.perf_counter() - began)
        return found

    lm.loglikelihood = timed


def choices(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores and chosen options of every item, in order, and the accuracy."""
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    scores = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
    sizes = [[len(choice) for choice in sample["doc"]["choices"]] for sample in samples]
    norm = [[s / n for s, n in zip(row, size, strict=True)] for row, size in zip(scores, sizes, strict=True)]
    return {
        "scores": scores,
        "acc": [row.index(max(row)) for row in scores],
        "acc_norm": [row.index(max(row)) for row in norm],
        "accuracy": sum(sample["acc"] for sample in samples) / len(samples),
    }


if __name__ == "__main__":
    main()
