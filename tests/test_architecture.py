"""The rules of the design, held by pytest: who imports whom, file and function sizes, no prints."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("search_spaces", "objectives", "allocator")
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
FORBIDDEN = {
    "search_spaces": {"objectives", "allocator"},
    "objectives": {"allocator"},
    "allocator": set(),
}
# Optional or heavy packages, and the only files that may import them.
HOMES = {
    "ray": {"allocator/executors/ray_pool.py"},
    "optuna": {
        "allocator/searches/cma.py",
        "allocator/searches/gp.py",
        "allocator/searches/nsga.py",
        "allocator/searches/sampled.py",
        "allocator/searches/tpe.py",
        "allocator/study.py",
        "allocator/study_storage.py",
    },
    "torchao": {"allocator/exporters/torchao.py", "objectives/latency.py"},
    "lm_eval": {"objectives/accuracy_task.py"},
    "gguf": {
        "allocator/exporters/gguf_file.py",
        "allocator/exporters/llama_cpp.py",
        "objectives/embedded.py",
    },
    "datasets": {"objectives/texts.py"},
    "matplotlib": {
        "allocator/report/comparison.py",
        "allocator/report/figures.py",
        "allocator/report/heatmap.py",
    },
}
TORCH_FREE = (
    "allocator.cli",
    "allocator.plan",
    "allocator.problem",
    "allocator.budget",
    "allocator.config",
    "allocator.journal",
    "allocator.latencies",
    "allocator.loop",
    "allocator.solvers",
    "allocator.searches",
    "allocator.exporters",
    "search_spaces.presets",
    "objectives.evaluation",
)


def imports(path: Path) -> set[str]:
    """Top-level names of everything a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_packages_import_downwards(path: Path) -> None:
    package = relative(path).split("/")[0]
    assert not imports(path) & FORBIDDEN[package]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_heavy_packages_stay_at_home(path: Path) -> None:
    for package in imports(path) & HOMES.keys():
        assert relative(path) in HOMES[package], f"{package} belongs in {HOMES[package]}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    limit = 120 if "cli" in path.parts else 70  # a command's options are lines of its signature
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < limit, f"{node.name} is too long"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_keyword_catch_alls_in_public_signatures(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert node.args.kwarg is None, node.name


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_open_with_what_they_are_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("module", TORCH_FREE)
def test_loads_without_torch_or_ray(module: str) -> None:
    code = (
        f"import {module}, sys, json; "
        "print(json.dumps([m for m in ('torch', 'ray') if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert json.loads(done.stdout) == []


def test_command_line_is_frozen() -> None:
    """A new verb or option is a decision: change this list on purpose."""
    from allocator.cli import app

    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert verbs == {
        "apply",
        "evaluate",
        "export",
        "export-study",
        "list",
        "pick",
        "profile",
        "report",
        "resume",
        "search",
        "show",
        "solve",
        "transfer",
    }
