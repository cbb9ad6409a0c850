"""Who may import whom (docs/architecture.md): read from the source, and asked of a running interpreter."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("coca", "pipelines", "serving", "jobs")
MAY_IMPORT = {
    "coca": {"coca"},
    "pipelines": {"pipelines", "coca"},
    "serving": {"serving", "coca"},
    "jobs": set(PACKAGES),
}
# Parts of coca/ that pipelines and the command line use: neither torch nor Ray.
TORCH_FREE = {
    "coca.addresses",
    "coca.clip_tokenizer",
    "coca.code_version",
    "coca.config",
    "coca.contract",
    "coca.dataset",
    "coca.disk_cache",
    "coca.errors",
    "coca.image_headers",
    "coca.image_resize",
    "coca.images",
    "coca.manifest",
    "coca.parquet_bytes",
    "coca.parquet_ranges",
    "coca.progress",
    "coca.row_groups",
    "coca.s3_folder",
    "coca.storage",
    "coca.tokenizer",
    "coca.train_config",
    "coca.typed_config",
    "coca.variants",
    "coca.withdrawn",
}


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(root: Path) -> dict[str, Path]:
    """Every module of the packages under ``root``, by name."""
    return {module_name(path, root): path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))}


def imported(path: Path, name: str) -> Iterator[str]:
    """Every module a file imports, wherever in it; for ``from a import b`` both ``a`` and ``a.b``."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            ancestor = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
            base = node.module or "" if node.level == 0 else ".".join(filter(None, [ancestor, node.module]))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(root: Path) -> list[str]:
    graph = {name: set(imported(path, name)) for name, path in modules(root).items()}
    found = []
    for name, targets in graph.items():
        package = name.partition(".")[0]
        for target in sorted(targets):
            top = target.partition(".")[0]
            if top in PACKAGES and top not in MAY_IMPORT[package]:
                found.append(f"{name} imports {target}")
            if top == "ray" and package == "coca":
                found.append(f"{name} imports ray")
        if package == "pipelines" or name in TORCH_FREE or name.endswith(".config"):
            found += [f"{name} imports torch by way of {chain}" for chain in chains_to(graph, name, "torch")]
        if name.endswith(".config"):
            found += [f"{name} imports ray by way of {chain}" for chain in chains_to(graph, name, "ray")]
    return sorted(set(found))


def chains_to(graph: dict[str, set[str]], start: str, forbidden: str) -> list[str]:
    """The chains of our own imports, as ``a > b``, that lead from a module to a forbidden package."""
    waiting, seen, found = [(start, start)], {start}, []
    while waiting:
        name, chain = waiting.pop()
        for target in sorted(graph[name]):
            if target.partition(".")[0] == forbidden:
                found.append(chain)
            elif target in graph and target not in seen:
                seen.add(target)
                waiting.append((target, f"{chain} > {target}"))
    return sorted(set(found))


def test_imports_keep_to_the_rules():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("module", "line", "violation"),
    [
        ("coca/bad.py", "import ray", "coca.bad imports ray"),
        ("coca/bad.py", "def f():\n    from ray import train", "coca.bad imports ray"),
        ("coca/bad.py", "from jobs import cli", "coca.bad imports jobs"),
        ("pipelines/bad.py", "import torch.nn", "pipelines.bad imports torch by way of pipelines.bad"),
        ("pipelines/bad.py", "from coca import model", "imports torch by way of pipelines.bad > coca.model"),
        ("pipelines/bad.py", "import serving", "pipelines.bad imports serving"),
        ("serving/bad.py", "import pipelines", "serving.bad imports pipelines"),
        ("serving/config.py", "from .engine import Engine", "by way of serving.config > serving.engine"),
        (
            "coca/storage.py",
            "from coca.model import x",
            "coca.storage imports torch by way of coca.storage > coca.model",
        ),
    ],
)
def test_the_rules_bite(tmp_path: Path, module: str, line: str, violation: str):
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "coca" / "model.py").write_text("import torch\n")
    (tmp_path / "serving" / "engine.py").write_text("import torch\n")
    assert violations(tmp_path) == []
    (tmp_path / module).write_text(f"{line}\n")
    assert any(violation in found for found in violations(tmp_path))


@pytest.mark.parametrize(
    ("wanted", "forbidden"),
    [
        (sorted(name for name in modules(ROOT) if name.startswith("coca")), ("ray",)),
        (sorted(name for name in modules(ROOT) if name.startswith("pipelines")), ("torch",)),
        (sorted(TORCH_FREE | {name for name in modules(ROOT) if name.endswith(".config")}), ("torch", "ray")),
    ],
    ids=["coca without ray", "pipelines without torch", "configs and the contract without both"],
)
def test_a_running_interpreter_agrees(wanted: list[str], forbidden: tuple[str, ...]):
    # jobs.commands.config is the command `coca config`, held to the same rule by its place in the list.
    code = f"import importlib, sys\nfor name in {wanted}: importlib.import_module(name)\n"
    code += f"print([name for name in {forbidden} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
