"""Models and data by their name on a model hub, through huggingface_hub.

HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to every tool that uses that library, and its
cache is shared with them. Only files that Tunesmith reads are fetched: never pickles, never code.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from tunesmith.errors import CatalogError, DiskError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*"]
# Below the top level lie other formats' files; consolidated.* repeats all weights under another naming.
_NOT_MODEL_FILES = ["*/*", "consolidated*"]
_DATA_FILES = ["*.jsonl", "*.json", "*.csv", "*.parquet", "*.txt", "LICENSE*"]


def is_hub_name(name: str) -> bool:
    """Whether `name` reads as ORG/NAME, or as ORG/NAME/FILE.gguf."""
    parts = name.split("/")
    if len(parts) == 3 and parts[2].endswith(".gguf"):
        name = "/".join(parts[:2])
    return _NAME.fullmatch(name) is not None


def fetch_model(name: str, revision: str | None = None) -> Path:
    """Give the local folder of the hub's model `name`, or the file of ORG/NAME/FILE.gguf. Raises CatalogError."""
    org, repo, *file = name.split("/")
    repo = f"{org}/{repo}"
    folder = _snapshot(repo, "model", revision, file or _MODEL_FILES, [] if file else _NOT_MODEL_FILES)
    if file:
        if not (folder / file[0]).is_file():
            raise CatalogError(f"{name}: {repo} has no file {file[0]}; its page lists the files it has")
        return folder / file[0]
    if not any(folder.glob("*.safetensors")):
        raise CatalogError(
            f"{repo}: it has no .safetensors file at its top level, and pickled weights (.bin, .pt) are never loaded; "
            f"name another model, or one of its GGUF files as {repo}/FILE.gguf"
        )
    return folder


def fetch_data(name: str, revision: str | None = None) -> Path:
    """Give the local folder of the hub's data set `name`. Raises CatalogError."""
    folder = _snapshot(name, "dataset", revision, _DATA_FILES, [])
    if not any(path.suffix.lstrip(".") in {"jsonl", "json", "csv", "parquet", "txt"} for path in folder.rglob("*")):
        raise CatalogError(f"{name}: the data set has no .jsonl, .json, .csv, .parquet or .txt file")
    return folder


def _snapshot(repo: str, kind: str, revision: str | None, allow: list[str], ignore: list[str]) -> Path:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the library is first imported
    from huggingface_hub import constants, errors, snapshot_download

    what = "model" if kind == "model" else "data set"
    try:
        return Path(
            snapshot_download(
                repo, repo_type=kind, revision=revision, allow_patterns=allow, ignore_patterns=ignore or None
            )
        )
    except errors.GatedRepoError as error:
        raise CatalogError(
            f"{repo}: this {what} is gated; accept its terms on its page, then set HF_TOKEN to a token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        token = "HF_TOKEN has no access to it" if os.environ.get("HF_TOKEN") else "it is private: set HF_TOKEN"
        raise CatalogError(f"{repo}: no such {what} at {constants.ENDPOINT}, or {token}; check the spelling") from error
    except errors.RevisionNotFoundError as error:
        raise CatalogError(f"{repo}: it has no revision {revision!r}; name a branch, a tag or a commit") from error
    except errors.LocalEntryNotFoundError as error:
        raise CatalogError(f"{repo}: {_unreachable(error)}") from error
    except errors.HFValidationError as error:
        raise CatalogError(f"{repo}: not a name that a hub can have: {_first_line(error)}") from error
    except OSError as error:  # the library's HTTP errors are OSErrors too
        if error.errno is not None and not isinstance(error, ConnectionError):
            raise DiskError(
                f"{constants.HF_HUB_CACHE}: {repo} could not be stored there ({(error.strerror or '').lower()}); set "
                "HF_HOME to a folder with space that can be written to"
            ) from error
        raise CatalogError(f"{repo}: {constants.ENDPOINT} failed: {_first_line(error)}; try again") from error
    except Exception as error:
        # The HTTP library's own errors (a connection that broke off) have no base class that the hub's library names.
        if type(error).__module__.split(".")[0] not in {"httpx", "httpx2", "httpcore", "httpcore2", "requests"}:
            raise
        raise CatalogError(
            f"{repo}: the download from {constants.ENDPOINT} broke off ({_first_line(error)}); try again, what has "
            "arrived is kept"
        ) from error


def _unreachable(error: Exception) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return f"not (completely) in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; unset it to download"
    cause = error.__cause__
    answered = getattr(getattr(cause, "response", None), "status_code", None)
    if answered is not None:
        return f"{constants.ENDPOINT} answered with status {answered}; try again later"
    return (
        f"not in {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} cannot be reached "
        f"({type(cause or error).__name__}); connect to the network, or set HF_ENDPOINT to a mirror"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
