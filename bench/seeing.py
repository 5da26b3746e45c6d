"""Does it see? CIFAR-10 as a question with ten options, against a logistic regression on the same frozen features.

python -m bench.seeing --data-dir FOLDER             FOLDER/cifar10/cifar10_train_jpg.zip: CLASS/NUMBER.jpg; of 500 a
                                                     class the first 400 are learnt, the others asked
python -m bench.seeing --data-dir FOLDER --rows v1,text --epochs 1
python -m bench.seeing --data-dir FOLDER --fresh     forget what an earlier run has finished

Every row is `tunesmith train`, then `tunesmith evaluate` on the images that were held out, and on the same with their
labels shuffled. Killed and started again, it goes on. The results are in seeing.json and seeing.md.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bench.ledger import Ledger, Record
from bench.pages import MODEL, discussion, kept, machine, run_options, threads, up_to, write_page, write_spec
from bench.process import run
from bench.runner import say
from bench.table import NOTHING, grid

ARCHIVE = Path("cifar10", "cifar10_train_jpg.zip")
LORA = {"kind": "lora"}


def _beside_lora(adapter: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": "mixed", "parts": [dict(adapter), LORA]}


V1, V2, TOKENS = ({"kind": kind} for kind in ("llama_adapter_image", "llama_adapter_v2_image", "image_projection"))
# name -> what it is, `adapter:`
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "v1": ("LLaMA-Adapter with images", V1),
    "v1+lora": ("the same beside LoRA", _beside_lora(V1)),
    "v2": ("LLaMA-Adapter v2 with images", V2),
    "tokens": ("visual tokens, projected", TOKENS),
    "tokens+lora": ("the same beside LoRA", _beside_lora(TOKENS)),
    "text": ("LLaMA-Adapter, which sees nothing", {"kind": "llama_adapter"}),
    "text+lora": ("LoRA, which sees nothing", LORA),
}
SEES = {name for name, (_, adapter) in ROWS.items() if "image" in json.dumps(adapter)}


@dataclass(frozen=True)
class Options:
    """What the page was asked for; `learn` and `ask` are images a class."""

    rows: tuple[str, ...]
    model: str
    encoder: str
    learn: int
    ask: int
    epochs: float
    batch: int
    template: str
    rates: Mapping[str, float]
    threads: int

    def key(self, name: str) -> dict[str, Any]:
        """What a row is, by which its results are found again."""
        own = {k: v for k, v in asdict(self).items() if k not in ("rows", "rates")}
        return {**own, "row": name, "adapter": adapter(self, name), "rate": self.rates.get(name)}


def adapter(options: Options, name: str) -> dict[str, Any] | None:
    """A row's `adapter:`, with the encoder; None for the regression."""
    if name not in ROWS:
        return None
    own: dict[str, Any] = json.loads(json.dumps(ROWS[name][1]))
    for part in own.get("parts", [own]):
        if "image" in part["kind"]:
            part["encoder"] = options.encoder
    return own


def unpack(archive: Path, folder: Path, learn: int, ask: int) -> Path:
    """Folders of labelled images: train, valid, and `shuffled` with the valid ones under labels drawn at random."""
    target = folder / f"{learn}-{ask}"
    if (target / "whole").is_file():
        return target
    shutil.rmtree(target, ignore_errors=True)
    with zipfile.ZipFile(archive) as file:
        by_class: dict[str, list[str]] = {}
        for name in sorted(n for n in file.namelist() if n.endswith(".jpg")):
            by_class.setdefault(PurePosixPath(name).parent.name, []).append(name)
        held: list[tuple[str, bytes]] = []
        for label, names in by_class.items():
            for number, name in enumerate(names[: learn + ask]):
                data = file.read(name)
                split = "train" if number < learn else "valid"
                _write(target / "images" / split / label, f"{number}.jpg", data)
                if split == "valid":
                    held.append((label, data))
                elif not number:
                    _write(target / "shuffled" / "train" / label, "0.jpg", data)  # names the classes
    labels = [label for label, _ in held]
    random.Random(0).shuffle(labels)
    for number, (label, (_, data)) in enumerate(zip(labels, held, strict=True)):
        _write(target / "shuffled" / "valid" / label, f"{number}.jpg", data)
    (target / "whole").touch()
    return target


def _write(folder: Path, name: str, data: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def measure(options: Options, ledger: Ledger, images: Path, work: Path, out: Path) -> int:
    """Run what is not in the ledger yet; returns how many rows failed."""
    failed = 0
    for name in ("regression", *options.rows):
        key = options.key(name)
        if ledger.find(key) is None:
            say(f"{name} ...")
            record = _row(options, name, images, work)
            ledger.add(key, record)
            failed += "error" in record
            say(f"{name}: {record.get('error') or record['accuracy']}")
        found = results(options, ledger)
        write_page(out / "seeing", found, page(found, kept(out / "seeing.md")))
    return failed


def _row(options: Options, name: str, images: Path, work: Path) -> Record:
    """Accuracies of one row, of the regression or of a trained model; {"error": ...} where it failed."""
    env = threads(options.threads)
    if name == "regression":
        return _told("regression", {"images": str(images / "images"), "encoder": options.encoder}, work, env)
    runs = work / "seeing-runs"
    shutil.rmtree(runs / name, ignore_errors=True)
    words = ["--model", options.model, "--data", str(images / "images"), "--output-dir", str(runs), "--name", name]
    settings = {"adapter": adapter(options, name), "train.epochs": options.epochs, "train.batch_size": options.batch}
    settings |= {"evaluate.samples": 0, "evaluate.every_steps": 1_000_000, "evaluate.rows": 50}
    settings |= {"data.template": options.template} if options.template else {}
    settings |= {"train.learning_rate": options.rates[name]} if name in options.rates else {}
    words += [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    trained = run([sys.executable, "-m", "tunesmith", "train", *words], env=env)
    if trained.error:
        return {"error": trained.error}
    folders = {"accuracy": str(images / "images"), "shuffled": str(images / "shuffled")}
    found = _told("asked", {"run": str(runs / name), "folders": folders}, work, env)
    return {**found, "seconds": round(trained.wall_s, 1)}


def _told(event: str, wanted: Mapping[str, Any], work: Path, env: Mapping[str, str]) -> Record:
    """What the child for this event tells; {"error": ...} where it told nothing."""
    spec = write_spec(work / "seeing.json", wanted)
    done = run([sys.executable, "-m", f"bench.children.seeing_{event}", str(spec)], env=env)
    if not done.told(event):
        return {"error": done.error or "told nothing"}
    return {key: value for key, value in done.told(event)[0].items() if key not in ("event", "t")}


def results(options: Options, ledger: Ledger) -> dict[str, Any]:
    """What seeing.json holds: the options, and the rows that are there."""
    found: dict[str, Any] = {"format": 1, "options": asdict(options), "rows": {}, "errors": {}}
    for name in ("regression", *options.rows):
        record, error = ledger.find(options.key(name)), ledger.error(options.key(name))
        if record is not None:
            found["rows"][name] = record
        elif error:
            found["errors"][name] = error
    return found


def page(found: Mapping[str, Any], words: str) -> str:
    """seeing.md; `words` are a person's own, which are kept."""
    rows, asked = dict(found["rows"]), found["options"]
    regression = rows.pop("regression", None)
    if regression is None:
        return NOTHING
    table = [("logistic regression on the same features", _share(regression, "accuracy"), "", "")]
    for name, record in rows.items():
        told = f"`{name}`: {ROWS[name][0]}"
        shuffled = _share(record, "shuffled") if name in SEES else ""
        table.append((told, _share(record, "accuracy"), shuffled, f"{record['seconds']:.0f}"))
    lines = [
        *("# Does it see?", "", "```sh", command(asked), "```", ""),
        f"CIFAR-10 asked as a question with {regression['classes']} options, with {asked['model']} and features of",
        f"{asked['encoder']}: {regression['train']:,} images learnt, {regression['valid']:,} others asked. Accuracy by",
        "the likeliest option, with its 95% interval; *shuffled*: the same images under labels drawn at random.",
        "",
        grid(("", "accuracy", "shuffled", "seconds"), table),
        "",
        *(f"- **failed: `{name}`**: {reason}" for name, reason in found["errors"].items()),
    ]
    return "\n".join([*lines, *discussion(words), "## Machine", "", machine(regression["about"]), ""])


def _share(record: Mapping[str, Any], what: str) -> str:
    return f"{record[what]:.1%} +-{record[f'{what}_interval']:.1%}"


def command(asked: Mapping[str, Any]) -> str:
    """The command that makes the page again."""
    words = [f"--learn {asked['learn']} --ask {asked['ask']} --epochs {asked['epochs']:g} --batch {asked['batch']}"]
    words += [f"--threads {asked['threads']} --encoder {asked['encoder']}"]
    words += [f"--template {shlex.quote(asked['template'])}"] if asked["template"] else []
    words += [f"--rate {name}={rate:g}" for name, rate in asked["rates"].items()]
    if tuple(asked["rows"]) != tuple(ROWS):
        words.append(f"--rows {','.join(asked['rows'])}")
    return f"python -m bench.seeing --data-dir FOLDER {' '.join(words)}"


def main(words: Sequence[str] | None = None) -> int:
    """Measure, write the page; 0 done, 1 a row failed, 2 a wrong word."""
    given = _parser().parse_args(words)
    rates = dict(given.rate)
    if unknown := [name for name in [*given.rows, *rates] if name not in ROWS]:
        say(f"seeing: rows are {', '.join(ROWS)}; got {', '.join(unknown)}")
        return 2
    archive = given.data_dir / ARCHIVE
    if not archive.is_file():
        say(f"seeing: {archive} is not there; say with --data-dir where it is")
        return 2
    options = Options(
        tuple(given.rows), given.model, given.encoder, given.learn, given.ask, given.epochs, given.batch,
        given.template, rates,
        given.threads,
    )  # fmt: skip
    images = unpack(archive, given.work / "cifar10", given.learn, given.ask)
    ledger = Ledger(given.work / "seeing.jsonl", fresh=given.fresh)
    try:
        failed = measure(options, ledger, images, given.work, given.out)
    except KeyboardInterrupt:
        say("seeing: stopped; the same command goes on")
        return 130
    return int(failed > 0)


def _rate(word: str) -> tuple[str, float]:
    name, _, value = word.partition("=")
    return name, float(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.seeing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help=f"folder that holds {ARCHIVE}")
    parser.add_argument("--rows", type=lambda word: [n for n in word.split(",") if n], default=list(ROWS))
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--encoder", default="efficientnet-lite0")
    parser.add_argument("--learn", type=up_to(100_000), default=400, help="images a class that are learnt")
    parser.add_argument("--ask", type=up_to(100_000), default=100, help="images a class that are asked")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--batch", type=up_to(4096), default=32)
    parser.add_argument("--template", default="", help="data.template; without it, the model's chat template")
    parser.add_argument("--rate", type=_rate, action="append", default=[], metavar="ROW=RATE", help="a learning rate")
    return run_options(parser)


if __name__ == "__main__":
    sys.exit(main())
