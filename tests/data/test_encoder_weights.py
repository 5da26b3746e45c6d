"""Weights out of torch's old format, without unpickling: as torch reads them, and nothing else is understood."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from tunesmith.data.encoder_weights import read_legacy
from tunesmith.errors import CatalogError


def test_tensors_are_as_torch_reads_them(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(5, 2))
    state = model.state_dict()
    state["transposed"] = torch.arange(12.0).view(3, 4).t()
    state["part"] = torch.arange(12.0)[4:8]
    state["scalar"] = torch.tensor(7)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    found = read_legacy(tmp_path / "old.pth")
    assert list(found) == list(state)
    for name, tensor in torch.load(tmp_path / "old.pth", weights_only=True).items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.marker,))


def test_nothing_is_run_and_nothing_else_is_understood(tmp_path: Path) -> None:
    marker, file = tmp_path / "was-run", tmp_path / "bad.pth"
    torch.save({"w": Hostile(marker)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(CatalogError, match="bad.pth: is not a file of tensors as torch wrote them"):
        read_legacy(file)
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists(), "the file would have done it"


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 0.99])
def test_a_file_that_is_cut_short_is_refused(share: float, tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(50)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "old.pth").read_bytes()
    (tmp_path / "old.pth").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CatalogError, match="fetch it again"):
        read_legacy(tmp_path / "old.pth")


def test_other_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.pth").write_bytes(pickle.dumps({"a": 1}) * 5)
    with pytest.raises(CatalogError, match="fetch it again"):
        read_legacy(tmp_path / "p.pth")
