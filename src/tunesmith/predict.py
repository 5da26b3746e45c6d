"""`predict`: a label and its probability for every text of a file of any size.

FILE -> checked and hashed whole, row by row -> chunks of rows -> labels -> OUT, in the order of FILE
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tunesmith import __version__, api
from tunesmith.adapters.peft_format import adapter_folder
from tunesmith.config import Run
from tunesmith.data.schemas import default_instruction
from tunesmith.data.texts import TextRow, scan_texts
from tunesmith.errors import CatalogError, ConfigError, DataError, Interrupted
from tunesmith.evaluate.labelled_file import LabelledFile, check_format
from tunesmith.evaluate.labelling import Labeller
from tunesmith.evaluate.trained import as_trained, trained_run
from tunesmith.files import sha256_file
from tunesmith.inference.prefill import context_limit

CHUNK_ROWS, CHUNK_CHARACTERS = 512, 1 << 20  # a chunk ends with whichever comes first: bounds memory
CUTOFF = 1024  # where neither the model, the run nor the command says one


def predict(
    target: str | Path,
    file: Path,
    out: Path,
    *,
    names: Sequence[str] = (),
    instruction: str | None = None,
    column: str = "text",
    base: str | None = None,
    cutoff: int | None = None,
    min_probability: float = 0.0,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Label the texts of `file` into `out` (.jsonl or .csv), going on where an earlier call stopped; returns counts.

    `names` of the labels and `instruction` are the run's own where they are not given. Rows whose label is less
    probable than `min_probability` are left out. Raises ConfigError, DataError; Interrupted on Ctrl-C, when all chunks
    that are done stay.
    """
    check_format(out)
    if not 0 <= min_probability <= 1:
        raise ConfigError(f"--min-probability {min_probability}: should be from 0 to 1")
    names, instruction, usual = _task(Path(target), names, instruction)
    texts = scan_texts(file, column)
    labeller, weights = _labeller(target, base, names, instruction, cutoff, usual)
    source = {
        "file": sha256_file(file), "column": column, "rows": texts.rows, **_adapter(Path(target)), "base": weights,
        "labels": list(labeller.labels), "instruction": instruction, "cutoff": labeller.limit,
        "template": labeller.template.fingerprint()["sha256"], "dtype": str(labeller.model.dtype),
        "min_probability": min_probability, "tunesmith": __version__,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{out}.lock", timeout=0):
            target_file = LabelledFile(out, source, texts.keys)
            there = target_file.progress.rows
            _label(texts.read(there), labeller, target_file, min_probability, texts.rows, note)
    except Timeout:
        raise ConfigError(f"--out {out}: another process is writing it") from None
    done = target_file.progress
    written = done.rows - done.left_out
    return {
        "file": str(file), "out": str(out), "rows": done.rows, "rows_before": there, "written": written,
        "left_out": done.left_out, "cut": done.cut, "labels": {name: done.labels.get(name, 0) for name in names},
        "mean_probability": done.probability / written if written else None,
    }  # fmt: skip


def _label(
    rows: Iterable[TextRow],
    labeller: Labeller,
    out: LabelledFile,
    min_probability: float,
    total: int,
    note: Callable[[str], None],
) -> None:
    try:
        for chunk in _chunks(rows):
            before = out.progress.rows
            out.add(chunk, labeller.label([text for text, _ in chunk]), min_probability)
            if out.progress.rows * 10 // total > before * 10 // total:  # a line for every tenth
                note(f"labelled {out.progress.rows:,} of {total:,}")
    except KeyboardInterrupt:
        raise Interrupted(
            f"{out.path}: {out.progress.rows:,} of {total:,} rows are done; the same command goes on"
        ) from None


def _chunks(rows: Iterable[TextRow]) -> Iterator[list[TextRow]]:
    chunk: list[TextRow] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += len(row[0])
        if len(chunk) >= CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _task(target: Path, names: Sequence[str], instruction: str | None) -> tuple[tuple[str, ...], str, int | None]:
    """Labels, instruction and cut-off: those of the run at `target`, unless given. Raises ConfigError."""
    run = trained_run(target)
    own = None if run is None else run.data.instruction
    if not names:
        if run is None:
            raise ConfigError("--labels: say which labels there are; only a run folder's own configuration tells them")
        names, own = _trained_on(run)
    if instruction is None:
        instruction = own if own is not None else default_instruction(sorted(names))
    return tuple(names), instruction, None if run is None else run.data.cutoff


def _trained_on(run: Run) -> tuple[tuple[str, ...], str]:
    """The labels and the instruction that a run was trained with.

    What its configuration leaves open is read from its data, as the training did. Raises ConfigError.
    """
    try:
        section = as_trained(run.data)
    except (DataError, CatalogError) as error:
        raise ConfigError(f"--labels: give them; the run's data, which tells them, cannot be read ({error})") from None
    if not section.labels or section.instruction is None:
        raise ConfigError("predict: the run was not trained on text and label; give --labels")
    return section.labels, section.instruction


def _labeller(
    target: str | Path, base: str | None, names: Sequence[str], instruction: str, cutoff: int | None, usual: int | None
) -> tuple[Labeller, str]:
    """The model as it was trained, ready to label, and the hash of its base.

    Texts are cut at `cutoff`, or where the model's context ends.
    """
    loaded = api.load(base, adapter=target) if adapter_folder(Path(target)) is not None else api.load(target)
    template, adapters = api.acting(loaded)
    limits = [limit for limit in (cutoff, context_limit(loaded.model.config)) if limit is not None]
    limit = min(limits, default=usual or CUTOFF)
    labeller = Labeller(loaded.model, loaded.tokenizer, template, tuple(names), instruction, adapters, limit)
    return labeller, str(loaded.identity["sha256"])


def _adapter(target: Path) -> dict[str, Any]:
    """Hashes of the adapter's files; nothing for a bare model."""
    folder = adapter_folder(target)
    if folder is None:
        return {}
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
    return {"adapter": {path.name: sha256_file(path) for path in files}}
