import json
from collections.abc import Callable
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from coca.errors import BadInput, RunFailed
from jobs.commands.options import Outcome, coca_command, describe_error


def run(body: Callable[[], Any], *words: str) -> Result:
    return CliRunner().invoke(click.command()(coca_command(body)), words)


def failing(error: BaseException) -> Callable[[], Any]:
    def body() -> None:
        raise error

    return body


def test_json_is_the_last_line_and_only_when_asked_for():
    def body() -> dict[str, Any]:
        click.echo("for people")
        return {"n": 1, "caption": "é"}

    assert run(body).stdout == "for people\n"
    assert run(body, "--json").stdout == 'for people\n{"n": 1, "caption": "é"}\n'


def test_outcome_sets_the_exit_code_and_still_prints_the_result():
    result = run(lambda: Outcome({"ok": False}, 3), "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout) == {"ok": False}


def test_bad_input_is_exit_2_with_one_line():
    result = run(failing(BadInput("no column 'text'", "Give --column")), "--json")
    assert result.exit_code == 2
    assert result.stderr == "error: no column 'text'. Give --column.\n"
    assert json.loads(result.stdout) == {"error": "no column 'text'. Give --column."}


def test_other_errors_are_exit_1_and_one_line_however_long():
    result = run(failing(RunFailed("all workers died\nagain")))
    assert (result.exit_code, result.stderr) == (1, "error: all workers died again\n")
    result = run(failing(ValueError("a\nb")))
    assert (result.exit_code, result.stderr) == (1, "error: ValueError: a b (--debug shows the traceback)\n")


def test_traceback_only_with_debug():
    assert "Traceback" not in run(failing(ValueError("x"))).stderr
    assert "Traceback" in run(failing(ValueError("x")), "--debug").stderr


def test_missing_extra_names_the_install_command():
    code, line = describe_error(ModuleNotFoundError("No module named 'torch'", name="torch"))
    assert (code, line) == (2, "torch is not installed. pip install 'coca[train]'.")


def test_our_own_missing_module_is_not_an_extra():
    code, line = describe_error(ModuleNotFoundError("No module named 'coca.nope'", name="coca.nope"))
    assert code == 1
    assert "coca.nope" in line


@pytest.mark.ray
def test_bad_input_of_a_ray_task_is_still_bad_input(ray_cluster: object):
    import ray

    @ray.remote
    def task() -> None:
        raise BadInput("the file is empty", "Give another")

    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(task.remote())
    assert describe_error(caught.value) == (2, "the file is empty. Give another.")
