"""The whole road in small: killed in the middle and started again, it completes; started once more, it skips."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

# Seconds that each stage of the small demo takes, about.
LASTS_S = {"web": 1.0, "tokenizer": 0.1, "refresh": 12.0, "train": 20.0, "tune": 20.0, "evaluate": 2.0, "serve": 8.0}
STAGES = list(LASTS_S)
SMALL = ["scenes=400", "steps=8", "trials=2", "trial_steps=2", "questions=2"]


def demo(out: Path) -> list[str]:
    sets = [word for setting in SMALL for word in ("--set", setting)]
    return [sys.executable, "-m", "jobs.cli", "demo", "--out", str(out), "--json", *sets]


def run_to_the_end(out: Path) -> tuple[dict[str, Any], str]:
    done = subprocess.run(demo(out), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def run_and_kill(out: Path, stage: str, delay_s: float) -> bool:
    """Start the demo and SIGKILL it ``delay_s`` after a stage began; whether that cut the stage off."""
    process = subprocess.Popen(demo(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began = out / "stages" / f"{stage}.begun.json"
    before = began.stat().st_mtime_ns if began.exists() else 0
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if began.exists() and began.stat().st_mtime_ns > before:
            time.sleep(delay_s)
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    return not (out / "stages" / f"{stage}.json").exists()


def check_summary(summary: dict[str, Any], out: Path) -> None:
    assert summary["links"] == summary["samples"] + sum(summary["rejected"].values())
    expected = json.loads((out / "web/expected.json").read_text())
    assert {name: summary[name] for name in ("links", "samples", "rejected")} == expected
    assert (summary["train"]["steps"], summary["train"]["workers"]) == (8, 2)
    assert len(summary["tune"]["trials"]) == 2
    assert len(summary["serve"]["captions"]) == 2
    assert set(summary["wall_s"]) == set(STAGES)
    assert json.loads((out / "summary.json").read_text()) == summary
    page = (out / "report.html").read_text()
    assert "<script src" not in page
    assert 'href="http' not in page


@pytest.mark.timeout(600)
def test_killed_in_training_it_completes_and_then_skips(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    assert run_and_kill(out, "train", delay_s=8)
    assert (out / "stages/refresh.json").exists()
    summary, printed = run_to_the_end(out)
    check_summary(summary, out)
    for stage in ("web", "tokenizer", "refresh"):
        assert f"{stage}: done before, skipped" in printed
    again, printed = run_to_the_end(out)
    assert again == summary
    assert all(f"{stage}: done before, skipped" in printed for stage in STAGES)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_in_every_stage_it_completes(tmp_path: Path) -> None:
    """One demo, killed up to twice in each stage at seeded moments within the time the stage takes."""
    rng = random.Random(0)
    out = tmp_path / "demo"
    cut_off = set()
    for stage, seconds in LASTS_S.items():
        for _ in range(2):
            done = (out / "stages" / f"{stage}.json").exists()
            if not done and run_and_kill(out, stage, delay_s=rng.uniform(0, seconds)):
                cut_off.add(stage)
    assert len(cut_off) >= 5, cut_off  # a short stage may be through before the kill
    summary, _ = run_to_the_end(out)
    check_summary(summary, out)
