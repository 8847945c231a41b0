"""Imports point one way, and nothing optional is needed to import the package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "dist_defend"
LAYERS = [
    {
        "arguments",
        "errors",
        "plugins",
        "keys",
        "screen",
        "files",
        "lock",
        "lifeline",
        "strict_json",
        "strict_yaml",
        "terminal",
        "batch",
        "tv_compat",
        "ops",
    },
    {"attacks", "models", "data"},
    {"engine", "evaluate"},
    {"trial"},
    {"methods"},
    {"config", "experiment", "results"},
    {
        "report",
        "bench",
        "doctor",
        "sweep",
        "launch",
        "plan",
        "importing",
        "import_check",
        "evaluate_command",
        "methods_command",
    },
    {"cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def area(file: Path) -> str:
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_areas(source: str) -> set[str]:
    """First-level names below dist_defend that a file imports, at its top or inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "dist_defend":
            names = [f"dist_defend.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [node.module or ""]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("dist_defend.")}
    return found - {"__version__"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_one_way(file: Path) -> None:
    if file == PACKAGE / "__init__.py":
        assert imported_areas(file.read_text()) == {"tv_compat"}
        return
    own = LEVEL[area(file)]  # KeyError: give the new module its layer above
    upward = {name for name in imported_areas(file.read_text()) if LEVEL[name] > own}
    assert not upward, f"{file.name} (layer {own}) imports {sorted(upward)} from above"


def test_the_import_parser_sees_every_spelling() -> None:
    source = (
        "import dist_defend.a.b\nfrom dist_defend import c, __version__\ndef f():\n    from dist_defend.d.e import g\n"
    )
    assert imported_areas(source) == {"a", "c", "d"}


def test_imports_without_the_extras() -> None:
    """Every module but the FFCV back end's own loads on a machine without ffcv, deepspeed and open_clip."""
    code = """
import importlib, pkgutil, sys
missing = ["ffcv", "deepspeed", "transformers", "open_clip"]
sys.modules.update(dict.fromkeys(missing))  # None: import raises ModuleNotFoundError
import dist_defend
names = [m.name for m in pkgutil.walk_packages(dist_defend.__path__, "dist_defend.")]
names = [n for n in names if "ffcv" not in n.rpartition(".")[2] and not n.endswith("__main__")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= len(FILES) // 2
