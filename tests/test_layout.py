"""The structure that docs/architecture.md describes: imports point one way, without circles; files stay short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "pdbench").rglob("*.py"))
ROOMS = ("serving", "cluster", "load", "power", "kv", "proxy", "analysis", "plan", "search", "report", "live")
BASE = ("config", "records", "files", "documents", "events", "errors", "http", "nvml", "supervisor")
MAY_IMPORT = {
    "kv": ("events",),
    "load": BASE,
    "power": BASE,
    "serving": (*BASE, "kv"),  # the range of vLLM versions that the connector supports
    "proxy": BASE,
    "analysis": ("records", "failures", "files", "documents", "events", "errors", "config"),
    "search": (),  # what loads say, whoever sends them
    "plan": (
        "analysis",
        "load",
        "records",
        "failures",
        "files",
        "events",
        "errors",
        "config",
    ),  # the load as bench would send it
    "report": (
        "plan",
        "search",
        "analysis",
        "records",
        "failures",
        "files",
        "documents",
        "validation",
        "events",
        "errors",
        "config",
    ),
    # What is told of a load and of devices while they are measured, drawn as the report draws it.
    "live": (*BASE, "failures", "analysis", "report", "load", "power", "server_metrics"),
    "cluster": (*BASE, "serving", "load", "power", "host", "site", "doctor"),
}
"""Room -> what it may import beside itself. Modules at the root (cli, experiment, ...) are not limited here."""
CIRCULAR = {"pdbench.site": {"pdbench.cluster.site"}}
"""`open_site` makes the site that a command needs, and the cluster's is a subclass of it."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, *, for_types: bool) -> set[str]:
    """Modules of pdbench that `path` imports, also within functions; `for_types`: with those that only a type checker imports."""
    modules = {module_of(file) for file in FILES}
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if not for_types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name in modules)
        if isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in modules else node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_stands_below_them(room: str) -> None:
    for path in (ROOT / "pdbench" / room).rglob("*.py"):
        for name in imports_of(path, for_types=True):
            first = name.split(".")[1] if "." in name else "pdbench"
            assert first in (room, "pdbench", *MAY_IMPORT[room]), f"{module_of(path)} imports {name}"


def test_imports_have_no_circles() -> None:
    imports = {module_of(path): imports_of(path, for_types=False) for path in FILES}
    left = {module: needs - {module} - CIRCULAR.get(module, set()) for module, needs in imports.items()}
    while left:
        free = {module for module, needs in left.items() if not needs & left.keys()}
        assert free, f"these modules import each other in a circle: {sorted(left)}"
        left = {module: needs for module, needs in left.items() if module not in free}


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda path: path.stem)
def test_files_have_at_most_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_architecture_page_names_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    missing = [module_of(path) for path in FILES if path.stem != "__init__" and f"`{path.name}`" not in page]
    assert not missing, f"docs/architecture.md does not name {missing}"


@pytest.mark.parametrize("name", ["experiment.py", "trial.py"])
def test_measuring_knows_no_cluster(name: str) -> None:
    assert "cluster" not in (ROOT / "pdbench" / name).read_text().lower()


def test_every_command_starts_without_what_only_some_need() -> None:
    """Each import of these takes a second or a large part of one."""
    code = "import sys, pdbench.cli; print(*{'numpy', 'scipy', 'matplotlib', 'plotly', 'vllm', 'ray'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
