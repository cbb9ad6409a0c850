"""What README.md and docs/ say is true: the file tree, and every command and option they show.

The tree is a fenced block opened with three backticks and ``tree``. Each line is a path, two or more spaces and a
comment; two spaces of indentation put a line inside the folder above it; a folder ends with a slash::

    coca/          the model and what it needs, without Ray
      losses.py    contrastive and captioning loss
"""

import re
import shlex
from pathlib import Path

import click
import pytest

from jobs.cli import COMMANDS, cli

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
UNLISTED = re.compile(r"\.(?!ci$).*|__pycache__|.*\.egg-info|runs|data|build|dist|shared|core")
COMMAND = re.compile(r"(?:^|[`$(\s])coca ((?:-C \S+ )?[a-z]+(?: [^`\n]*)?)")


def tree(text: str) -> dict[str, str]:
    """Path -> comment of the README's tree."""
    block = re.search(r"```tree\n(.*?)```", text, re.DOTALL)
    assert block, "README.md has no ```tree block"
    entries: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    for line in filter(str.strip, block[1].splitlines()):
        indent = len(line) - len(line.lstrip())
        path, _, comment = line.strip().partition("  ")
        parents = [(depth, parent) for depth, parent in parents if depth < indent]
        full = (parents[-1][1] if parents else "") + path
        entries[full] = comment.strip()
        if full.endswith("/"):
            parents.append((indent, full))
    return entries


def untrue(entries: dict[str, str], root: Path) -> list[str]:
    """Every way in which a tree differs from what lies on disk."""
    wrong = [f"{path} is not there" for path in entries if not (root / path).exists()]
    wrong += [f"{path}: a folder ends with a slash" for path in entries if (root / path).is_dir() != path.endswith("/")]
    wrong += [f"{path} has no comment" for path, comment in entries.items() if not comment]
    folders = {""} | {path.rpartition("/")[0] + "/" for path in entries if "/" in path.rstrip("/") and path[-1] != "/"}
    for folder in sorted(folders):
        for entry in sorted((root / folder).iterdir()):
            name = folder + entry.name + ("/" if entry.is_dir() else "")
            listed = entry.is_dir() if folder == "" else entry.suffix == ".py" and entry.name != "__init__.py"
            if listed and not UNLISTED.fullmatch(entry.name) and name not in entries:
                wrong.append(f"{name} is missing")
    return wrong


def shown_commands(text: str) -> list[str]:
    """Each ``coca ...`` of a document's code: fenced lines and inline spans."""
    joined = re.sub(r"\\\n\s*", " ", text)
    code = [line for block in re.findall(r"```\w*\n(.*?)```", joined, re.DOTALL) for line in block.splitlines()]
    code += re.findall(r"(?<!`)`(coca [^`\n]+)`(?!`)", re.sub(r"```.*?```", "", joined, flags=re.DOTALL))
    return [match[1].strip() for line in code for match in COMMAND.finditer(line)]


def problem(line: str) -> str:
    """Why a command line would be refused before it does anything, or nothing."""
    words = shlex.split(line.partition(" #")[0].replace("...", ""), posix=True)
    if words[0] == "-C":
        words = words[2:]
    if words[0] not in COMMANDS:
        return f"there is no command {words[0]}"
    context = click.Context(cli)
    command = cli.get_command(context, words.pop(0))
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        command = command.get_command(context, name)
        if command is None:
            return f"there is no sub-command {name}"
    assert command is not None
    if "--" in words:
        inner = words[words.index("--") + 1 :]
        return problem(shlex.join(inner)) if inner else ""
    known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in known | {"--help"}]
    return f"unknown options {unknown}" if unknown else ""


def test_the_tree_of_the_readme_is_true():
    assert untrue(tree((ROOT / "README.md").read_text(encoding="utf-8")), ROOT) == []


def test_the_tree_check_bites(tmp_path: Path):
    for path in ("coca/losses.py", "coca/model.py", "jobs/cli.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    entries = tree(
        "```tree\ncoca/        the model\n  losses.py  two losses\n  gone.py    was here\njobs  drivers\n```"
    )
    assert untrue(entries, tmp_path) == [
        "coca/gone.py is not there",
        "jobs: a folder ends with a slash",
        "jobs/ is missing",
        "coca/model.py is missing",
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_in_documents_exist_with_their_options(document: Path):
    lines = shown_commands(document.read_text(encoding="utf-8"))
    wrong = {line: found for line in lines if (found := problem(line))}
    assert wrong == {}


def test_the_command_check_bites():
    text = "Run `coca trian --data x`, then:\n\n```bash\ncoca train \\\n  --dta x\ncoca submit -- config shw x\n```\n"
    assert [problem(line) for line in shown_commands(text)] == [
        "unknown options ['--dta']",
        "there is no sub-command shw",
        "there is no command trian",
    ]
