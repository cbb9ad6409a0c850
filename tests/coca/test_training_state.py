"""Copies that training does not reach, and resume.json."""

import json
from pathlib import Path

import pytest
import torch

from coca.errors import BadInput
from coca.manifest import file_entry, write_manifest
from coca.storage import Store
from coca.training_state import HostCopies, ResumeFile, Score, read_resume


def test_copies_keep_what_the_tensors_were() -> None:
    tensors = {
        "matrix": torch.arange(6.0).reshape(2, 3),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "bytes": torch.get_rng_state(),
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    copies = HostCopies().take(tensors)
    for tensor in tensors.values():
        tensor.zero_()
    assert all(torch.equal(copies[name], tensor) for name, tensor in before.items())


def test_memory_is_used_again() -> None:
    copies, parameter = HostCopies(), torch.nn.Parameter(torch.ones(4))
    first = copies.take({"x": parameter})["x"]
    with torch.no_grad():
        parameter.fill_(2)
    second = copies.take({"x": parameter})["x"]
    assert (second.data_ptr(), second.tolist(), second.requires_grad) == (first.data_ptr(), [2.0] * 4, False)
    assert copies.take({"x": torch.ones(5)})["x"].shape == (5,)


def test_the_same_memory_under_two_names_is_copied_once() -> None:
    weight = torch.rand(3, 3)
    copies = HostCopies().take({"model/w": weight, "plain/w": weight.view(3, 3), "half": weight[:1], "t": weight.T})
    assert copies["model/w"].data_ptr() == copies["plain/w"].data_ptr()
    assert len({copies[name].data_ptr() for name in ("model/w", "half", "t")}) == 3
    assert torch.equal(copies["t"], weight.T)


def written(folder: Path, data: bytes) -> Store:
    store = Store(folder)
    store.write("x/resume.json", data)
    write_manifest(store, "x", {"resume.json": file_entry(data)})
    return store.child("x")


def test_resume_file_round_trip(tmp_path: Path) -> None:
    saved = ResumeFile(position=3, fixed={"a.b": [1]}, counters={"n": 2}, score=Score(name="loss", value=0.5))
    assert read_resume(written(tmp_path, saved.to_json())) == saved


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"position": -1}, "'position'"),
        ({"fixed": []}, "'fixed'"),
        ({"counters": {"n": "many"}}, "'counters.n'"),
        ({"score": {"name": "loss", "value": float("nan")}}, "'score.value'"),
        ({"more": 1}, "'more'"),
    ],
)
def test_hostile_values_are_refused_by_name(tmp_path: Path, changes: dict[str, object], named: str) -> None:
    values = {"position": 3, "fixed": {}} | changes
    with pytest.raises(BadInput, match=rf"resume.json: .*{named}"):
        read_resume(written(tmp_path, json.dumps(values).encode()))


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path, ResumeFile(position=3, fixed={}).to_json())
    folder.write("resume.json", ResumeFile(position=4, fixed={}).to_json())
    with pytest.raises(BadInput, match=r"resume.json does not match its SHA-256"):
        read_resume(folder)
