"""What every test may use: the real small model and data through the catalog, one torch thread a worker, no hub."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; the hub's tests run processes of their own
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest

from tunesmith.errors import CatalogError


def pytest_configure(config: pytest.Config) -> None:
    """Each xdist worker computes with one thread: two workers with all cores each would fight for them."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real SmolLM2-135M-Instruct, as a .gguf file."""
    from tunesmith.data.catalog import resolve_model

    return _resolved(resolve_model, "smollm2-135m-instruct")


@pytest.fixture(scope="session")
def movie_reviews() -> Path:
    """The folder of the real movie reviews: train.jsonl, valid.jsonl, test.jsonl."""
    from tunesmith.data.catalog import resolve_data

    return _resolved(resolve_data, "movie-reviews")


def _resolved(resolve, name: str) -> Path:
    try:
        return resolve(name)
    except CatalogError as error:
        if os.environ.get("CI"):  # there, a test that cannot run has failed
            raise
        pytest.skip(f"NOT TESTED, {name} is neither in the cache nor to be fetched: {error}")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA of two layers with its tokenizer and chat template, as a Hugging Face folder. Do not change it."""
    from tests.tiny import write_base

    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def tiny_reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 reviews with labels for training and 8 for validation, as a folder. Do not change it."""
    from tests.tiny import review_folder

    return review_folder(tmp_path_factory.mktemp("reviews"))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify in this process: a fresh one takes seconds, and tests/export and test_workflow.py see to that."""
    from functools import partial

    from tunesmith import workflow

    monkeypatch.setattr(workflow, "verify_run", partial(workflow.verify_run, fresh=False))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]):
    """Run `tunesmith ARGS` in this process: (exit code, stdout, stderr)."""
    from tunesmith.cli import main

    def run(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def single_thread() -> Iterator[None]:
    """One torch thread, as in the child processes that results are compared with; the number comes back afterwards."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
