"""Imports point one way, and nothing optional is needed to import the package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "dist_defend"
LAYERS = [
    {
        "aligned",
        "arguments",
        "bounds",
        "commands",
        "errors",
        "plugins",
        "keys",
        "screen",
        "files",
        "lock",
        "lifeline",
        "strict_json",
        "strict_yaml",
        "templates",
        "terminal",
        "batch",
        "tv_compat",
        "ops",
    },
    {"attacks", "models", "data"},
    {"engine", "counts", "detection", "inside"},
    {"trial"},
    {"methods"},
    {"config", "experiment", "results", "given", "session"},
    {
        "report",
        "removal",
        "bench",
        "doctor",
        "sweep",
        "zoo",
        "launch",
        "plan",
        "importing",
        "import_check",
        "evaluate_command",
        "methods_command",
        "reproduce",
        "publish",
        "runs_command",
    },
    {"cli", "api", "__main__"},
    {"compat"},
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
    """Every module loads without them, but the FFCV back end's own, Triton's, and those that draw and tabulate."""
    code = """
import importlib, pkgutil, sys
missing = ["ffcv", "deepspeed", "transformers", "open_clip", "pandas", "pyarrow", "matplotlib", "wandb", "triton",
           "argcomplete", "huggingface_hub"]
sys.modules.update(dict.fromkeys(missing))  # None: import raises ModuleNotFoundError
import dist_defend
names = [m.name for m in pkgutil.walk_packages(dist_defend.__path__, "dist_defend.")]
other = ["report.exports", "report.html", "report.insides", "report.masks", "report.plots"]
other += ["report.shared", "report.tradeoff", "ops.kernels"]
other += ["sweep.collect", "sweep.comparison", "sweep.page", "sweep.report"]
names = [n for n in names if n.removeprefix("dist_defend.") not in other]
names = [n for n in names if "ffcv" not in n.rpartition(".")[2] and not n.endswith("__main__")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= len(FILES) // 2


def module_name(file: Path) -> str:
    name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imported_modules(source: str, modules: set[str]) -> set[str]:
    """Which of ``modules`` a file names in an import at its top, inside of functions, or to import_module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= below & modules or {node.module or ""}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}  # type: ignore[misc]
    return found & modules


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A walk along the imports that ends where it began; empty if there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        for other in sorted(graph[name]) if name not in done else []:
            if found := walk(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def test_no_module_needs_itself() -> None:
    """Not inside one folder either, and not by an import inside of a function."""
    names = {module_name(file): file for file in FILES}
    graph = {name: imported_modules(file.read_text(), set(names)) - {name} for name, file in names.items()}
    assert sum(map(len, graph.values())) > len(FILES), "the parser sees the imports"
    assert circle(graph) == []


def test_the_walk_finds_circles() -> None:
    modules = {"a", "a.b", "c", "d", "e"}
    assert imported_modules("from a import b, name\ndef f():\n    import c\n    import_module('d')", modules) == {
        "a.b",
        "c",
        "d",
    }
    assert imported_modules("from a import name", modules) == {"a"}
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
