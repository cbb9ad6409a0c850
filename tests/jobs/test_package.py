from pathlib import Path

import pytest

from coca.errors import BadInput
from jobs import package
from jobs.package import packed_files


def write(folder: Path, *names: str, size: int = 1) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)


def test_packs_code_without_git_environment_data_and_ignored_files(tmp_path: Path):
    kept = ["coca/model.py", "jobs/cli.py", "notes.txt", "tests/data/one.png"]
    left_out = [".git/HEAD", ".venv/bin/python", "data/samples/1.parquet", "runs/demo/summary.json"]
    left_out += ["coca/__pycache__/model.pyc", "secret.env", "big/model.bin"]
    write(tmp_path, *kept, *left_out)
    (tmp_path / ".gitignore").write_text("*.env\n")
    (tmp_path / ".rayignore").write_text("big/\n")
    found = [path.relative_to(tmp_path).as_posix() for path in packed_files(tmp_path)]
    assert found == [".gitignore", ".rayignore", *kept]


def test_a_package_beyond_rays_limit_names_the_biggest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(package, "MAX_PACKAGE_BYTES", 3 << 20)
    write(tmp_path, "films/a.bin", "films/b.bin", size=2 << 20)
    write(tmp_path, "code.py", size=10)
    with pytest.raises(BadInput, match=r"packs to 4 MiB, and Ray takes 3: films \(4 MiB\), code.py.*\.rayignore"):
        packed_files(tmp_path)
