"""Make what a job needs, once, for all sides: rows in a file, their ids, and the model as a Hugging Face folder.

rows.jsonl     the rows as `tunesmith train` reads them
train.jsonl    the same rows as ids and labels, as `tunesmith train` encodes them (its data hash proves it)
held.jsonl     rows that nobody trains on, as ids and labels
model-DTYPE/   the base in Hugging Face's layout, the same weights in bfloat16 or float32
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.children.common import IGNORE, spec, tell

LONG_SPARE = 1.15  # words enough that a row surely fills its cut-off


def main() -> None:
    """Write the files of one job and tell of them."""
    wanted = spec()
    folder = Path(wanted["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    if wanted["source"] == "random":
        facts = random_rows(wanted, folder)
    else:
        facts = encode(wanted, folder)
    tell("prepared", **facts)


def encode(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Rows and ids of a job, by the code that trains on them; returns counts, the data hash and places."""
    from tunesmith.config import load_run
    from tunesmith.data.catalog import resolve_model
    from tunesmith.data.pack import plan_packs
    from tunesmith.prepare import load_data, template_for
    from tunesmith.tokenizer import load_tokenizer

    train, held = SOURCES[wanted["source"]](wanted)
    _write(folder / "rows.jsonl", train)
    _write(folder / "held-rows.jsonl", held)
    flags = {"model.path": wanted["model"], "data.train": str(folder / "rows.jsonl"), **wanted["settings"]}
    flags["data.valid"] = str(folder / "held-rows.jsonl")
    run, _ = load_run(None, [], flags)
    path = resolve_model(run.model.path)
    tokenizer = load_tokenizer(path)
    data = load_data(run, tokenizer, template_for(run, tokenizer))
    sets = {"train": data.train, "held": data.valid or data.train}
    for name, encoded in sets.items():
        _write(folder / f"{name}.jsonl", [_plain(example) for example in encoded.examples])
    packs = plan_packs(data.train.examples, budget=4096)
    export(path, tokenizer, folder.parent, wanted["dtypes"])
    report = data.train.report
    return {
        "rows": len(data.train.examples), "tokens": report.tokens, "supervised": report.supervised,
        "longest": report.longest, "distinct": sum(len(pack.tokens) for pack in packs), "data_sha256": data.fingerprint,
        "model_path": str(path), "held_rows": len(sets["held"].examples),
        "held_tokens": sets["held"].report.supervised, "prompts": _prompts(train, tokenizer, wanted),
        "prompts_only": wanted["kind"] == "decode",
    }  # fmt: skip


def export(path: Path, tokenizer: Any, folder: Path, dtypes: list[str]) -> None:
    """Write the model once for each dtype: config.json, model.safetensors, tokenizer.json; and which model it is."""
    import torch
    from safetensors.torch import save_file

    from tunesmith.model.load import load_model, model_identity

    identity = model_identity(path)["sha256"]
    for dtype in dtypes:
        target = folder / f"model-{dtype}"
        whole = target / "exported-from"  # written last
        if whole.is_file() and whole.read_text(encoding="utf-8") == identity:
            continue
        whole.unlink(missing_ok=True)
        target.mkdir(parents=True, exist_ok=True)
        model = load_model(path, dtype=getattr(torch, dtype))
        wanted = model.config.weight_shapes()
        save_file(
            {k: v.contiguous() for k, v in model.state_dict().items() if k in wanted},
            target / "model.safetensors",
            {"format": "pt"},
        )
        tokenizer.save(target)
        config = {"architectures": ["LlamaForCausalLM"], **model.config.to_hf(), "torch_dtype": dtype}
        (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        whole.write_text(identity, encoding="utf-8")


def random_rows(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Rows of random ids and unequal lengths, the second half of each a target, and a config.json; no tokenizer."""
    draw, vocab = random.Random(0), wanted["config"]["vocab_size"]
    rows = []
    for _ in range(wanted["rows"]):
        ids = [draw.randrange(3, vocab) for _ in range(draw.randint(wanted["cutoff"] // 4, wanted["cutoff"]))]
        half = len(ids) // 2
        rows.append({"ids": ids, "labels": [IGNORE] * half + ids[half:]})
    _write(folder / "train.jsonl", rows)
    (folder / "config.json").write_text(json.dumps(wanted["config"]), encoding="utf-8")
    tokens, supervised = sum(len(r["ids"]) for r in rows), sum(len(r["ids"]) - len(r["ids"]) // 2 for r in rows)
    return {"rows": len(rows), "tokens": tokens, "supervised": supervised, "longest": wanted["cutoff"]}


def alpaca(wanted: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Alpaca's rows in a fixed random order, and the first held-out ones."""
    folder = Path(wanted["data_dir"]) / "alpaca"
    with gzip.open(folder / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    random.Random(0).shuffle(rows)
    with (folder / "dev.jsonl").open(encoding="utf-8") as file:
        held = [json.loads(line) for line in file]
    keys = ("instruction", "input", "output")
    rows, held = rows[: wanted["rows"]], held[: wanted["held"]]
    return [{k: r[k] for k in keys} for r in rows], [{k: r[k] for k in keys} for r in held]


def reviews(wanted: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Movie reviews of the catalog, in a fixed random order."""
    train, held = (list(_reviews(split)) for split in ("train", "valid"))
    random.Random(0).shuffle(train)
    random.Random(0).shuffle(held)
    return train[: wanted["rows"]], held[: wanted["held"]]


def long(wanted: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Reviews end to end, as texts long enough to fill the cut-off."""
    from tunesmith.data.catalog import resolve_model
    from tunesmith.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve_model(wanted["model"]))
    texts = (str(row["text"]) for row in _reviews("train"))
    wanted_tokens, rows = int(wanted["cutoff"] * LONG_SPARE), []
    for _ in range(wanted["rows"] + min(wanted["held"], 4)):
        parts, tokens = [], 0
        while tokens < wanted_tokens:
            parts.append(next(texts))
            tokens += len(tokenizer.encode(parts[-1])) + 1
        rows.append({"text": "\n".join(parts)})
    return rows[: wanted["rows"]], rows[wanted["rows"] :]


SOURCES = {"alpaca": alpaca, "reviews": reviews, "long": long}


def _reviews(split: str) -> Iterator[dict[str, Any]]:
    from tunesmith.data.catalog import resolve_data

    with (resolve_data("movie-reviews") / f"{split}.jsonl").open(encoding="utf-8") as file:
        yield from (json.loads(line) for line in file)


def _prompts(rows: list[dict[str, Any]], tokenizer: Any, wanted: dict[str, Any]) -> list[list[int]]:
    """Ids of the prompts that a decoding job starts from; no two begin alike after the instruction."""
    if wanted["kind"] != "decode":
        return []
    return [tokenizer.encode(f"Write a long review of a film.\n{row['text']}\n") for row in rows]


def _plain(example: Any) -> dict[str, list[int]]:
    ids, flags = example.ids.tolist(), example.supervised.tolist()
    return {"ids": ids, "labels": [i if flag else IGNORE for i, flag in zip(ids, flags, strict=True)]}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
