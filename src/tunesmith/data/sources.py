"""Rows from files: json, jsonl (also .gz), csv, parquet, txt, and folders with train, valid and test.

Every row keeps the file and line it came from. A .txt file is text for continued pretraining: blank lines part it into
rows. Limits keep a hostile file from hanging or filling memory; whatever is wrong is one line naming file and line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.data.image_field import from_folder
from tunesmith.data.image_folders import is_image_folder, read_image_folder
from tunesmith.data.schemas import Row, default_instruction, find_schema, labels, read_row, recognise, with_instruction
from tunesmith.data.scienceqa import is_scienceqa, read_scienceqa, splits_of
from tunesmith.errors import DataError, did_you_mean

MAX_LINE = 16 << 20  # bytes of one row
MAX_JSON = 1 << 30  # bytes of a .json file, which is read whole
MAX_BLANK = 1_000_000  # blank lines in a row
MAX_EXPANSION = 100  # times a .gz file may grow, over 4 MiB: text grows 3 to 20 times
SPLITS = {"train": ("train", "training"), "valid": ("valid", "validation", "val", "dev", "eval"), "test": ("test",)}
NOT_SPACE = re.compile(r"[^ \t\n\r]")

Numbered = Iterator[tuple[int, Any]]  # line (1-based), parsed row


@dataclass(frozen=True, slots=True)
class Splits:
    """The rows of a data set; `valid` and `test` are empty where the data has none."""

    train: list[Row]
    valid: list[Row]
    test: list[Row]


def read_rows(
    path: Path, *, schema: str = "auto", limit: int | None = None, instruction: str | None = None
) -> list[Row]:
    """Read a data file; `rows[0].kind` says which schema was recognised.

    `limit` stops after so many rows. Classification rows are asked with `instruction`, by default one that lists the
    labels of this file (read_splits: of the training set). Raises DataError naming file and line.
    """
    rows = _read_file(Path(path), schema, limit)
    return _instruct(rows, instruction, rows)


def read_splits(
    path: Path,
    *,
    schema: str = "auto",
    limit: int | None = None,
    instruction: str | None = None,
    captions: bool = False,
) -> Splits:
    """Read a folder with train, valid and test files (valid: also validation, val, dev), or one file as train.

    A folder may also be ScienceQA's as it is published (`captions`: they join the context), or hold images by class.
    """
    path = Path(path)
    if not path.is_dir():
        rows = read_rows(path, schema=schema, limit=limit, instruction=instruction)
        return Splits(rows, [], [])
    if is_scienceqa(path):
        own = [(split, name) for name in splits_of(path) for split, known in SPLITS.items() if name in known]
        asked = {split: read_scienceqa(path, name, captions=captions, limit=limit) for split, name in own}
        return Splits(**{split: asked.get(split, []) for split in SPLITS})
    if is_image_folder(path, SPLITS):
        seen = read_image_folder(path, SPLITS, limit)
        return Splits(**{split: _instruct(seen.get(split, []), instruction, seen["train"]) for split in SPLITS})
    files = _split_files(path)
    read = {name: _read_files(files[name], schema, limit) for name in SPLITS}
    kinds = {rows[0].kind: name for name, rows in read.items() if rows}
    if len(kinds) > 1:
        found = ", ".join(f"{name} is {kind}" for kind, name in kinds.items())
        raise DataError(f"{path}: its files have different schemas ({found}); bring them to one schema")
    return Splits(**{name: _instruct(rows, instruction, read["train"]) for name, rows in read.items()})


def split_rows(rows: Sequence[Row], valid_size: int | float, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Take `valid_size` rows (or that share, under 1) out for validation; the same rows for the same seed.

    Rows of equal text stay together in training, so that none of them is on both sides.
    """
    count = round(len(rows) * valid_size) if isinstance(valid_size, float) and valid_size < 1 else int(valid_size)
    if not 0 <= count < len(rows):
        raise DataError(f"data.valid_size={valid_size}: must be less than the {len(rows)} rows of the data")
    times: dict[object, int] = {}
    for row in rows:
        times[row.turns, row.image] = times.get((row.turns, row.image), 0) + 1
    single = [i for i, row in enumerate(rows) if times[row.turns, row.image] == 1]
    if len(single) < count:
        raise DataError(f"data.valid_size={valid_size}: only {len(single)} rows occur once; lower it")
    chosen = set(random.Random(seed).sample(single, count))
    return [r for i, r in enumerate(rows) if i not in chosen], [r for i, r in enumerate(rows) if i in chosen]


def _instruct(rows: list[Row], instruction: str | None, train: Sequence[Row]) -> list[Row]:
    if not rows or rows[0].kind != "classification":
        return rows
    of = "the text" if rows[0].fields["text"] else "the image"
    asked = default_instruction(labels(train or rows), of) if instruction is None else instruction
    return with_instruction(rows, asked)


def _read_files(paths: Sequence[Path], schema: str, limit: int | None) -> list[Row]:
    rows: list[Row] = []
    for path in paths:
        left = None if limit is None else limit - len(rows)
        if left is None or left > 0:
            rows += _read_file(path, schema, left)
            schema = rows[0].kind
    return rows


def raw_rows(path: Path) -> Numbered:
    """Lines or row numbers of a data file, from 1, with the parsed row as it stands there, of any known extension.

    Raises DataError naming file and line.
    """
    try:
        yield from _reader(path)(path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); copy or download it again") from None


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a text file, from 1, without their ends, blank ones too. Raises DataError naming file and line."""
    _reader(path)
    try:
        yield from _lines(path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); copy or download it again") from None


def _read_file(path: Path, schema: str, limit: int | None) -> list[Row]:
    if limit is not None and limit < 1:
        raise DataError(f"data.limit={limit}: must be at least 1")
    known = None if schema == "auto" else find_schema(schema)
    rows: list[Row] = []
    for line, raw in islice(raw_rows(path), limit):
        where = f"{path}:{line}"
        known = known or recognise(raw, where)
        row = read_row(raw, where, known)
        rows.append(replace(row, image=from_folder(row.image, path.parent)) if row.image is not None else row)
    if not rows:
        raise DataError(f"{path}: holds no row; give it data or name another file")
    return rows


def _reader(path: Path) -> Callable[[Path], Numbered]:
    """The reader for this file's extension."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name one of its files, or give it a train file")
    if not path.exists():
        beside = sorted(p.name for p in islice(path.parent.iterdir(), 10_000)) if path.parent.is_dir() else []
        near = did_you_mean(path.name, beside) or (
            "" if path.parent.is_dir() else f"; nor is there a folder {path.parent}"
        )
        raise DataError(f"{path}: no such file{near}")
    kind = _extension(path)
    if kind not in READERS:
        known = ", ".join(READERS)
        raise DataError(f"{path}: unknown kind of file{did_you_mean(kind, READERS)} (known: {known})")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty; give it data or name another file")
    return READERS[kind]


def _extension(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split, in `folder` or its `data`: NAME.EXT, or shards NAME-00000-of-00004.EXT."""
    files = [p for place in (folder, folder / "data") if place.is_dir() for p in sorted(place.iterdir())]
    files = [p for p in files if p.is_file() and _extension(p) in READERS]
    found: dict[str, list[Path]] = {}
    for split, names in SPLITS.items():
        mine = [p for p in files if p.name.split(".")[0].split("-")[0].lower() in names]
        whole = [p for p in mine if "-" not in p.name.split(".")[0]]
        if len(whole) > 1 or (whole and len(mine) > len(whole)):
            listed = ", ".join(p.name for p in mine[:4])
            raise DataError(f"{folder}: more than one {split} file ({listed}); keep one")
        found[split] = mine
    if not found["train"]:
        seen = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise DataError(f"{folder}: no train file (train.jsonl, .json, .csv, .parquet or .txt); it holds {seen}")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 file without their ends, a BOM removed; long lines and expanding archives are refused."""
    packed = path.suffix.lower() == ".gz"
    allowance = MAX_EXPANSION * path.stat().st_size + (4 << 20)
    # the buffer's readline is C; GzipFile's own is not
    with io.BufferedReader(gzip.GzipFile(path), 1 << 20) if packed else path.open("rb") as file:
        total, number, blank = 0, 0, 0
        while raw := file.readline(MAX_LINE + 1):
            number += 1
            total += len(raw)
            blank = blank + 1 if raw.isspace() else 0
            if blank > MAX_BLANK:
                raise DataError(f"{path}:{number}: {MAX_BLANK:,} blank lines in a row; remove them")
            if len(raw) > MAX_LINE:
                raise DataError(f"{path}:{number}: the line is longer than {MAX_LINE >> 20} MiB; split it into rows")
            if packed and total > allowance:
                raise DataError(
                    f"{path}:{number}: grows more than {MAX_EXPANSION} times when unpacked; unpack it yourself"
                )
            yield number, _decode(raw, path, number).rstrip("\r\n")


def _decode(raw: bytes, path: Path, line: int) -> str:
    if line == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}: is UTF-16, not UTF-8; convert it: iconv -f utf-16 -t utf-8")
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{line}: is not UTF-8 (byte {error.start + 1} of the line is 0x{raw[error.start]:02x}); convert "
            "the file: iconv -f latin1 -t utf-8"
        ) from None


def _parse(text: str, path: Path, line: int, *, last: bool = False) -> Any:
    """Parse one JSON value; every way to fail is a DataError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        cure = "the file may have been cut off: copy it again" if last else "correct or remove the row"
        raise DataError(f"{path}:{line}: is not JSON ({error.msg}, column {error.colno}); {cure}") from None
    except RecursionError:
        raise DataError(f"{path}:{line}: is nested too deeply; remove the row") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{path}:{line}: {str(error).split(';')[0][:100]}; correct or remove the row") from None


def _jsonl(path: Path) -> Numbered:
    held: tuple[int, str] | None = None
    for number, text in _lines(path):
        if held:
            yield held[0], _parse(held[1], path, held[0])
        held = (number, text) if text.strip() else None
    if held:
        yield held[0], _parse(held[1], path, held[0], last=True)


def _json(path: Path) -> Numbered:
    """A list of rows, each with the line where it begins; the list is read element by element."""
    if path.stat().st_size > MAX_JSON:
        raise DataError(f"{path}: {path.stat().st_size >> 20} MiB of json; convert it to jsonl, which is read by line")
    text = _decode_whole(path)
    at = _skip(text, 0)
    if text[at : at + 1] != "[":
        if text[at : at + 1] == "{":
            raise DataError(
                f"{path}:1: is one object or a row a line, not a list; name it .jsonl, or put [ ] around it"
            )
        raise DataError(f"{path}:1: a .json file must hold a list of rows: [{{...}}, {{...}}]")
    line, counted = 1, 0
    at = _skip(text, at + 1)
    decoder = json.JSONDecoder()
    while text[at : at + 1] != "]":
        line += text.count("\n", counted, at)
        counted = at
        value, at = _element(decoder, text, at, path, line)
        yield line, value
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            here = line + text.count("\n", counted, at)
            what = "ends early: copy the file again" if at >= len(text) else "needs a ',' or ']' here: correct it"
            raise DataError(f"{path}:{here}: the list of rows {what}")
    if text[at + 1 :].strip():
        raise DataError(f"{path}:{text.count(chr(10), 0, at) + 1}: there is more after the list of rows; remove it")


def _skip(text: str, at: int) -> int:
    """The first position from `at` on that is not white space."""
    found = NOT_SPACE.search(text, at)
    return found.start() if found else len(text)


def _element(decoder: json.JSONDecoder, text: str, at: int, path: Path, line: int) -> tuple[Any, int]:
    try:
        return decoder.raw_decode(text, at)
    except json.JSONDecodeError as error:
        ends = error.pos >= len(text) - 1 or error.msg.startswith("Unterminated string")
        cure = "the file may have been cut off: copy it again" if ends else "correct it"
        raise DataError(f"{path}:{error.lineno}: is not JSON ({error.msg}, column {error.colno}); {cure}") from None
    except RecursionError:
        raise DataError(f"{path}:{line}: is nested too deeply; remove the row") from None
    except ValueError as error:
        raise DataError(f"{path}:{line}: {str(error).split(';')[0][:100]}; correct or remove the row") from None


def _decode_whole(path: Path) -> str:
    return "\n".join(_decode(raw.rstrip(b"\r\n"), path, n) for n, raw in enumerate(path.open("rb"), 1))


def _csv(path: Path) -> Numbered:
    """Rows under a header line; quoted fields may hold line breaks, and a row's line is the one where it begins."""
    csv.field_size_limit(MAX_LINE)
    reader = csv.reader((text + "\n" for _, text in _lines(path)), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            begin, line = line, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _header(cells, path)
            elif len(cells) != len(header):
                raise DataError(
                    f"{path}:{begin}: has {len(cells)} fields where the header has {len(header)}; put quotes around "
                    "fields that hold commas"
                )
            else:
                yield begin, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{line}: is not CSV ({error}); correct the quotes") from None


def _header(cells: list[str], path: Path) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(set(names)) < len(names) or "" in names:
        raise DataError(
            f"{path}:1: the header {names[:8]} has an empty or repeated name; the first line names the fields"
        )
    return names


def _parquet(path: Path) -> Numbered:
    """Rows of a Parquet file; a row's "line" is its number."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            f"{path}: reading parquet needs pyarrow; install it: pip install 'tunesmith[parquet]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for raw in batch.to_pylist():
                    number += 1
                    yield number, raw
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"{path}: is not a readable Parquet file ({reason}); write or download it again") from None


def _txt(path: Path) -> Numbered:
    """Text parted at blank lines; each part is a row of raw text."""
    part: list[str] = []
    begin = 1
    for number, text in _lines(path):
        if text.strip():
            begin = begin if part else number
            part.append(text)
        elif part:
            yield begin, {"text": "\n".join(part)}
            part = []
    if part:
        yield begin, {"text": "\n".join(part)}


READERS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
    ".jsonl.gz": _jsonl,
    ".txt.gz": _txt,
    ".csv.gz": _csv,
}
