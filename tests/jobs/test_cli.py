import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from jobs.cli import COMMANDS, cli


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, words)


def test_help_is_quick_and_imports_nothing_heavy():
    """The bar is half a second; the quickest of three, since the machine may be busy."""
    walls = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "jobs.cli", "--help"], check=True, capture_output=True)
        walls.append(time.perf_counter() - started)
    assert min(walls) < 0.5
    code = (
        "import sys, jobs.cli; print([m for m in ('pydantic', 'yaml', 'pyarrow', 'ray', 'torch') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_help_names_every_command():
    output = run("--help").output
    assert "Examples:" in output
    for name, text in COMMANDS.items():
        assert f"{name} " in output
        assert text in output


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_json_and_debug(name: str):
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    for leaf in command.commands.values() if isinstance(command, click.Group) else [command]:
        options = {option for parameter in leaf.params for option in parameter.opts}
        assert {"--json", "--debug"} <= options, f"coca {name}: {leaf.name}"


def test_version():
    assert run("--version").output == f"coca {version('coca')}\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian"], "error: unknown command 'trian'. Did you mean `coca train`? See `coca --help`.\n"),
        (["--vers"], "error: No such option '--vers'. Did you mean '--version'? See `coca --help`.\n"),
        (["config"], "error: Missing command. See `coca config --help`.\n"),
        (["submit"], "error: Missing argument '-- COMMAND...'. See `coca submit --help`.\n"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(words: list[str], line: str):
    result = run(*words)
    assert result.exit_code == 2
    assert result.stderr == line
    assert result.stdout == ""


def test_no_arguments_show_the_help():
    result = run()
    assert result.exit_code == 0
    assert result.output.startswith("Usage: coca")


def test_interrupt_is_exit_130(monkeypatch: pytest.MonkeyPatch):
    @click.command()
    def command() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.commands.doctor.command", command)
    result = run("doctor")
    assert result.exit_code == 130
    assert result.stderr.strip() == "error: interrupted"


def test_folder_option_runs_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "captions.csv").write_text("caption\na red cat\n")
    result = run("-C", "inner", "tokenizer", "train", "--from", "captions.csv", "--out", "t.json", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["captions"] == 1
    assert (tmp_path / "inner" / "t.json").is_file()


def test_a_reader_that_goes_away_leaves_no_traceback():
    done = subprocess.run(
        f"{sys.executable} -m jobs.cli config schema train | head -n 1", shell=True, capture_output=True, text=True
    )
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr
