import json

import pytest
import yaml
from click.testing import CliRunner, Result

from jobs.cli import cli
from jobs.commands.config import KINDS, settings


def config(*words: str) -> Result:
    return CliRunner().invoke(cli, ["config", *words])


def test_show_resolves_recipe_then_file_then_set(tmp_path):
    (tmp_path / "mine.yaml").write_text("train: {steps: 5, batch_size: 24}\n")
    result = config(
        "show", "train", "--recipe", "scenes", "--config", f"{tmp_path}/mine.yaml", "--set", "train.steps=7"
    )
    assert result.exit_code == 0, result.output
    shown = yaml.safe_load(result.stdout)
    assert (shown["train"]["steps"], shown["train"]["batch_size"]) == (7, 24)
    assert shown["train"]["model"]["vision"]["image_size"] == 48  # the recipe's
    assert shown["data"] == [{"uri": "<uri>", "version": None, "weight": 1.0}]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_shown_and_has_a_schema(kind: str):
    assert config("show", kind).exit_code == 0
    schema = json.loads(config("schema", kind, "--json").stdout.splitlines()[-1])
    assert schema["type"] == "object"


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_described(kind: str):
    undescribed = [setting.name for setting in settings(kind) if not setting.description]
    assert undescribed == []


def test_explain_a_key_and_a_section():
    result = config("explain", "train.batch_size", "--json")
    assert "train.batch_size  (train; integer > 0; default " in result.stdout
    found = json.loads(result.stdout.splitlines()[-1])["settings"]
    assert {setting["kind"] for setting in found} == {"train", "tune"}
    section = json.loads(config("explain", "workers", "--json").stdout.splitlines()[-1])["settings"]
    assert "workers.count" in {setting["name"] for setting in section}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["explain", "train.btch_size"], "there is no setting 'train.btch_size'. Did you mean 'train.batch_size'?"),
        (["show", "train", "--set", "train.btch=1"], "unknown config key 'train.btch'. Did you mean 'batch_size'?"),
        (["show", "train", "--recipe", "huge"], "there is no recipe 'huge'"),
        (["show", "serve", "--recipe", "scenes"], "serve has no recipes"),
        (["show", "nope"], "'nope' is not one of 'refresh', 'train', 'tune', 'serve'"),
        (["shw", "train"], "No such command 'shw'"),
    ],
)
def test_wrong_use_is_exit_2_with_one_line(words: list[str], message: str):
    result = config(*words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
