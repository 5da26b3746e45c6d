"""What every test may use: the real small model and data through the catalog, one torch thread a worker, no hub."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; the hub's tests run processes of their own
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("OMP_NUM_THREADS", "1")

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
