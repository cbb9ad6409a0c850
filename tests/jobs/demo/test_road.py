"""The road's own rules, on small stages: done is skipped, changed is made anew, nothing foreign is touched.

The real stages are walked, and killed, in tests/end_to_end/test_demo.py.
"""

import fcntl
import json
from pathlib import Path

import pytest

from coca.errors import BadInput, RunFailed
from jobs.demo import road
from jobs.demo.config import DemoConfig
from jobs.demo.stages import Stage


@pytest.fixture
def calls(monkeypatch):
    """Two stages: each writes a file with the settings it saw; the calls are kept."""
    made = []

    def write(name, setting):
        def function(folders, config):
            made.append(name)
            (folders.out / name).mkdir(exist_ok=True)
            (folders.out / name / "value").write_text(str(getattr(config, setting)))
            return {"value": getattr(config, setting)}

        return Stage(name, f"a stage {name}", (setting,), name, function, lambda result: f"value {result['value']}")

    monkeypatch.setattr(road, "STAGES", (write("first", "seed"), write("second", "steps")))
    return made


def walk(out, **settings):
    with road._hold(out):
        return road._run_stages(road.Folders(out), DemoConfig(**settings))


def test_what_is_done_is_skipped_and_said(calls, tmp_path, capsys):
    walk(tmp_path / "demo")
    markers = walk(tmp_path / "demo")
    assert calls == ["first", "second"]
    assert "[1/2] first: done before, skipped. value 0" in capsys.readouterr().out
    assert markers["second"]["made_with"] == {"seed": 0, "steps": DemoConfig().steps}


def test_a_changed_setting_makes_its_stage_and_those_after_it_anew(calls, tmp_path):
    out = tmp_path / "demo"
    walk(out)
    (out / "second" / "left over").touch()
    walk(out, steps=7)
    assert calls == ["first", "second", "second"]
    assert [path.name for path in (out / "second").iterdir()] == ["value"]
    walk(out, seed=1, steps=7)
    assert calls == ["first", "second", "second", "first", "second"]


def test_a_stage_that_was_cut_off_keeps_what_it_made_and_goes_on(calls, tmp_path, capsys):
    out = tmp_path / "demo"
    walk(out)
    (out / "stages" / "second.json").unlink()  # killed before the marker
    (out / "second" / "half").touch()
    markers = walk(out)
    assert (out / "second" / "half").exists()
    assert "second: a stage second, going on" in capsys.readouterr().out
    assert markers["second"]["attempts"] == 2


def test_a_stage_that_fails_leaves_no_marker(calls, tmp_path, monkeypatch):
    def fail(folders, config):
        raise RunFailed("no luck")

    first, second = road.STAGES
    broken = Stage("second", second.title, second.settings, second.makes, fail, second.tell)
    monkeypatch.setattr(road, "STAGES", (first, broken))
    with pytest.raises(RunFailed, match="no luck"):
        walk(tmp_path / "demo")
    names = {path.name for path in (tmp_path / "demo" / "stages").iterdir()}
    assert names == {"lock", "first.json", "first.begun.json", "second.begun.json"}


def test_an_earlier_stage_made_anew_unmarks_the_later_ones_at_once(calls, tmp_path, monkeypatch):
    out = tmp_path / "demo"
    walk(out)

    def fail(folders, config):
        raise RunFailed("killed here")

    first, second = road.STAGES
    broken = Stage("first", first.title, first.settings, first.makes, fail, first.tell)
    monkeypatch.setattr(road, "STAGES", (broken, second))
    with pytest.raises(RunFailed):
        walk(out, seed=5)
    assert not (out / "stages" / "second.json").exists()


def test_a_folder_with_other_things_is_refused_and_left_alone(calls, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(BadInput, match="holds other things than a demo"):
        walk(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(BadInput, match="is a file"):
        walk(tmp_path / "thesis.txt")
    assert calls == []


def test_two_demos_in_one_folder_are_kept_apart(calls, tmp_path):
    (tmp_path / "stages").mkdir()
    with (tmp_path / "stages" / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match="another coca demo works in"):
            walk(tmp_path)
    walk(tmp_path)


def test_the_summary_has_the_fields_that_are_promised():
    evaluated = {"held_out": 200, "exact_caption": 0.9, "captions": ["a"] * 200, "captions_two_objects": ["b"]}
    results = {
        "web": {"links": 5, "samples": 3, "rejected": {"timeout": 2}},
        "tokenizer": {},
        "refresh": {"links": 5, "samples": 3, "rejected": {"timeout": 2}},
        "train": {"steps": 10},
        "tune": {"trials": [], "best": {}},
        "evaluate": evaluated,
        "serve": {"captions": [], "embedding_dim": 4, "pictures": [1, 2]},
    }
    summary = road.summarize({name: {"result": result, "wall_s": 1.5} for name, result in results.items()})
    assert (summary["links"], summary["samples"], summary["rejected"]) == (5, 3, {"timeout": 2})
    assert summary["rejected_as_planted"] is True
    assert summary["evaluate"] == {"held_out": 200, "exact_caption": 0.9}
    assert summary["serve"] == {"captions": [], "embedding_dim": 4}
    assert summary["wall_s"] == dict.fromkeys(results, 1.5)
    results["refresh"]["rejected"] = {"timeout": 1, "not_found": 1}
    assert not road.summarize({n: {"result": r, "wall_s": 1.5} for n, r in results.items()})["rejected_as_planted"]


def test_json_is_replaced_whole(tmp_path):
    path = Path(tmp_path / "marker.json")
    road._write_json(path, {"a": "é"})
    road._write_json(path, {"a": "è"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "è"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("connected_before", "ended"), [(True, []), (False, [True])])
def test_a_ray_that_was_there_before_is_left_alone(calls, tmp_path, monkeypatch, connected_before, ended):
    """A road inside a process that has its own Ray, such as this test session, once took it down."""
    disconnected = []
    monkeypatch.setattr("jobs.cluster.is_connected", lambda: connected_before)
    monkeypatch.setattr("jobs.cluster.disconnect", lambda: disconnected.append(True))
    walk(tmp_path / "demo")
    assert disconnected == ended
