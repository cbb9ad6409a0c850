"""One worker meets every attack of hostile_web.py at once: no forbidden connect, no crash, bounded memory."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("hostile_web.py")
ROOT = SCRIPT.parents[2]

_spec = importlib.util.spec_from_file_location("hostile_web", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
hostile_web = importlib.util.module_from_spec(_spec)
sys.modules["hostile_web"] = hostile_web
_spec.loader.exec_module(hostile_web)


@pytest.fixture(scope="module")
def outcome() -> dict[str, Any]:
    """What the worker, a process of its own, says at the end."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", hostile_web.ATTACKS)
def test_an_attack_ends_in_its_reason(outcome: dict[str, Any], name: str) -> None:
    attack = hostile_web.ATTACKS[name]
    assert outcome["ends"][name] == [attack.reason and attack.reason.value] * attack.times


def test_no_forbidden_address_is_connected_to(outcome: dict[str, Any]) -> None:
    assert len(hostile_web.ATTACKS) >= 40
    assert outcome["connects"] == [hostile_web.OUR_ADDRESS]


def test_memory_stays_under_500_mb(outcome: dict[str, Any]) -> None:
    """The peak of the whole process, the server that attacks it included."""
    assert outcome["peak_mb"] < 500
