import json

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from jobs import doctor
from jobs.cli import cli
from jobs.doctor import Check, check_store, examine, show


def test_this_machine_passes_and_every_part_is_looked_at(tmp_path):
    checks = {check.name: check for check in examine(with_ray=False, store=str(tmp_path))}
    assert {"python", "packages: core", "packages: train", "torch", "cpus", "memory", "disk"} < checks.keys()
    assert [check for check in checks.values() if check.status == "failed"] == []
    assert checks["packages: train"].status == "ok"
    assert list(tmp_path.iterdir()) == []  # the probe is gone


def test_extras_are_followed_into_each_other():
    requirements = [Requirement(text) for text in doctor.importlib.metadata.requires("coca")]
    assert "torch" not in {r.name for r in doctor._expand(requirements, "")}
    assert {"torch", "ray", "boto3"} <= {r.name for r in doctor._expand(requirements, "tune")}


@pytest.mark.parametrize(
    ("requirement", "problem"),
    [("click>=8", ""), ("click>=99", "is outside >=99"), ("no-such-package", "missing")],
)
def test_package_problems(requirement: str, problem: str):
    found = doctor._package_problem(Requirement(requirement))
    assert problem in found
    assert bool(problem) == bool(found)


def test_an_extra_that_is_not_there_is_a_warning_and_the_core_a_failure():
    missing = {"torch": "missing"}
    assert doctor._package_check("train", missing).status == "warning"
    assert doctor._package_check("", missing).status == "failed"
    assert doctor._package_check("train", {"torch": "1.0 is outside >=2.9"}).status == "failed"


def test_amounts():
    gib = doctor.GIB
    assert [doctor._amount("disk", n * gib, 1, 4 * gib, "m").status for n in (5, 2, 0)] == ["ok", "warning", "failed"]


def test_store_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    check = check_store(f"{file}/below")
    assert check.status == "failed"
    assert check.mend


def test_s3_store(s3: str):
    assert check_store(f"{s3}/prefix").status == "ok"
    missing = check_store("s3://no-such-bucket/prefix")
    assert missing.status == "failed"
    assert "NoSuchBucket" in missing.detail


def test_a_failure_is_exit_1_and_shows_its_mend(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    result = CliRunner().invoke(cli, ["doctor", "--no-ray", "--json"])
    assert result.exit_code == 1
    assert "-> unset RAY_AUTH_MODE" in result.stdout
    assert json.loads(result.stdout.splitlines()[-1])["ok"] is False


@pytest.mark.ray
def test_ray_is_tried_and_a_cluster_in_use_is_left_running(ray_cluster: object):
    import ray

    checks = show(doctor.check_ray(), lambda line: None)
    assert [check.status for check in checks] == ["ok", "ok"]
    assert ray.is_initialized()


def test_a_dashboard_open_to_the_network_fails():
    assert doctor._check_dashboard("http://0.0.0.0:8265", started_here=True).status == "failed"
    assert doctor._check_dashboard("http://127.0.0.1:8265", started_here=True) == Check(
        "ray dashboard", "ok", "http://127.0.0.1:8265"
    )
