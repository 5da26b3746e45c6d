"""Writes that are there whole or not at all, whenever the process is killed or the disk fills.

    file:    temporary sibling -> write -> fsync -> rename -> fsync of the folder
    folder:  temporary sibling folder -> files, each fsynced -> COMPLETE (last) -> rename -> fsync of the parent

A temporary name is `.NAME.tmp-PID-RANDOM`; its writer holds a lock on it, so that `clean_leftovers` can tell what a
killed writer left behind from what a living one is still writing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import DiskError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MARKER = "COMPLETE"
_CHUNK = 8 * 2**20
_LEFTOVER = re.compile(r"^\.(?P<name>.+)\.(?P<kind>tmp|old)-\d+-[0-9a-f]{8}$")
_CURES = {
    errno.ENOSPC: "the disk is full: free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another folder",
    errno.EIO: "the disk reports an input/output error: check it, or choose a folder on another one",
    errno.EFBIG: "the file system does not take files of this size: choose another folder",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "permission denied: choose a folder that you may write to",
    errno.EPERM: "permission denied: choose a folder that you may write to",
}


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, creating its folder; whatever was there stays until the new file is whole.

    Raises DiskError (path, bytes needed) when a write fails; the old file is then untouched.
    """
    _atomic_write(Path(path), [data], len(data))


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all. Raises DiskError."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all; floats come back bit for bit. Raises DiskError."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def atomic_save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors to a safetensors file, whole or not at all, one tensor at a time.

    No second copy of all tensors is made, as serializing into one byte string would. Raises DiskError.
    """
    dtypes = _dtypes()
    order = list(dtypes)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    head = _safetensors_header({name: tensors[name] for name in names}, dtypes, metadata)
    size = len(head) + sum(tensors[name].numel() * tensors[name].element_size() for name in names)

    def parts() -> Iterator[bytes | memoryview]:
        yield head
        for name in names:
            yield _raw(tensors[name])

    _atomic_write(Path(path), parts(), size)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder to fill; on leaving the block it becomes `path`, with a COMPLETE marker, in one rename.

    An existing folder of that name is replaced. If the block raises, nothing of the new folder remains and the old
    one is untouched. Raises DiskError.
    """
    path = Path(path)
    _make_folder(path.parent)
    clean_leftovers(path.parent)
    staging = _temporary(path, "tmp")
    with _disk_errors(path, None):
        os.mkdir(staging)
        lock = _lock(staging)
    try:
        try:
            yield staging
            with _disk_errors(path, None):
                _seal(staging)
                _put_in_place(staging, path)
        except DiskError as error:
            raise DiskError(str(error).replace(str(staging), str(path))) from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        _unlock(lock)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path for another library to write to; on leaving the block it becomes `path`, in one rename.

    If the block raises, nothing of the new file remains and an older one is untouched. Raises DiskError.
    """
    path = Path(path)
    _make_folder(path.parent)
    clean_leftovers(path.parent)
    temporary = _temporary(path, "tmp")
    try:
        with _disk_errors(path, None):
            yield temporary
            descriptor = os.open(temporary, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
            _fsync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_complete(folder: str | Path) -> bool:
    """Whether `folder` carries its marker and every file that the marker lists, in its size (hashes: `damage`)."""
    return damage(folder, hashes=False) is None


def damage(folder: str | Path, *, hashes: bool = True) -> str | None:
    """Say what is wrong with a folder written by `atomic_folder` ("FILE: reason"), or None if it is whole.

    Sizes are always compared; with `hashes`, every file is read and its SHA-256 compared as well.
    """
    folder = Path(folder)
    try:
        listed = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"].items()
        entries = [(str(name), int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed]
    except FileNotFoundError:
        return f"{folder / MARKER}: missing, so the folder was never finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{folder / MARKER}: not readable"
    for name, size, sha256 in entries:
        file = folder / name
        try:
            found = file.stat().st_size
            if found != size:
                return f"{file}: {found} bytes where {size} were written"
            if hashes and sha256_file(file) != sha256:
                return f"{file}: its SHA-256 differs from what was written"
        except OSError as error:
            return f"{file}: {(error.strerror or str(error)).lower()}"
    return None


def remove_folder(path: str | Path) -> None:
    """Remove a folder so that no moment shows half of it: rename it to a temporary name first, then delete."""
    path = Path(path)
    doomed = _temporary(path, "tmp")
    with _disk_errors(path, None):
        os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clean_leftovers(folder: str | Path) -> list[Path]:
    """Remove what killed writers left in `folder`; give the paths that are gone.

    A folder that had been moved aside for a replacement which never arrived is put back. What a living process still
    writes is left alone; so is everything in a folder that may not be written to.
    """
    folder = Path(folder)
    gone = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _LEFTOVER.match(path.name)
        if match is None or _locked(path):
            continue
        with contextlib.suppress(OSError):
            target = folder / match["name"]
            if match["kind"] == "old" and not target.exists():
                os.rename(path, target)
            elif path.is_dir():
                shutil.rmtree(path)
                gone.append(path)
            else:
                path.unlink()
                gone.append(path)
    return gone


def sha256_file(path: str | Path) -> str:
    """Give the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_line(path: str | Path, line: str) -> None:
    """Append one line (without its newline) in a single write, so that a killed process leaves no half line.

    Raises DiskError.
    """
    path = Path(path)
    data = line.encode("utf-8") + b"\n"
    with _disk_errors(path, len(data)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            _write_all(descriptor, data)
        finally:
            os.close(descriptor)


def _atomic_write(path: Path, parts: Iterable[bytes | memoryview], size: int) -> None:
    _make_folder(path.parent)
    temporary = _temporary(path, "tmp")
    with _disk_errors(path, size):
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            try:
                _try_lock(descriptor)
                for part in parts:
                    _write_all(descriptor, part)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _fsync_folder(path.parent)


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[os.write(descriptor, view[:_CHUNK]) :]


def _seal(staging: Path) -> None:
    """Make every file of the folder durable, then say so in the marker: what it lists is on the disk."""
    files = {}
    for file in sorted(path for path in staging.rglob("*") if path.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        files[file.relative_to(staging).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    for folder in [*(path for path in staging.rglob("*") if path.is_dir()), staging]:
        _fsync_folder(folder)
    atomic_write_json(staging / MARKER, {"files": files})


def _put_in_place(staging: Path, path: Path) -> None:
    """Rename, moving an older folder aside first; a kill between the renames is undone by `clean_leftovers`."""
    if not path.exists():
        os.rename(staging, path)
        _fsync_folder(path.parent)
        return
    old = _temporary(path, "old")
    lock = _lock(path)  # follows the folder to its other name
    try:
        os.rename(path, old)
        try:
            os.rename(staging, path)
        except BaseException:
            os.rename(old, path)
            raise
        _fsync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        _unlock(lock)


def _make_folder(folder: Path) -> None:
    with _disk_errors(folder, None):
        folder.mkdir(parents=True, exist_ok=True)


def _fsync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder; a rename there is durable by itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


@contextlib.contextmanager
def _disk_errors(path: Path, needed: int | None) -> Iterator[None]:
    """Turn an OSError of a write into a DiskError that names the path, the bytes needed and the way out."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        cure = _CURES.get(error.errno or 0, error.strerror or str(error))
        amount = "" if needed is None else f" ({needed:,} bytes needed{_free(path)})"
        raise DiskError(f"{path}: could not be written{amount}: {cure}") from error


def _free(path: Path) -> str:
    try:
        return f", {shutil.disk_usage(path.parent).free:,} free"
    except OSError:
        return ""


def _try_lock(descriptor: int) -> bool:
    """Lock an open file or folder; False if another process holds it, True if it is ours or locks do not exist here."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


def _lock(folder: Path) -> int | None:
    if os.name == "nt":
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    _try_lock(descriptor)
    return descriptor


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _safetensors_header(
    tensors: Mapping[str, Tensor], dtypes: Mapping[torch.dtype, str], metadata: Mapping[str, str] | None
) -> bytes:
    """8 bytes of length (little endian), JSON of dtype, shape and offsets, spaces up to a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": dtypes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _dtypes() -> dict[torch.dtype, str]:
    """Names of the format, in the order in which the safetensors library lays types out (widest first: aligned)."""
    import torch

    return {
        torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32",
        torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16",
        torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
        torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    }  # fmt: skip


def _raw(tensor: Tensor) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
