"""Compiled kernels follow the content of everything that they are compiled from, and need no folder to write to."""

import ast
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dist_defend.data import draws, fused, kernels

DATA = Path(kernels.__file__).parent
SMALL = {  # a kernel that takes a constant of one module and a function of another
    "augment.py": "TOP = 1\n",
    "pixels.py": "SCALE = 10\n",
    "draws.py": "from kernels import kernel\n@kernel()\ndef draw(x):\n    return x + 1\n",
    "fused.py": "from augment import TOP\nfrom draws import draw\nfrom kernels import kernel\n"
    "from pixels import SCALE\n"
    "@kernel()\ndef render(x):\n    return SCALE * draw(x) + TOP\n\n"
    "print(render(5), sum(render.stats.cache_hits.values()))\n",
}


def run(folder: Path, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    environment = {**kept, "HOME": str(folder / "home"), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.fixture()
def small(tmp_path: Path) -> Path:
    for name, text in SMALL.items():
        (tmp_path / name).write_text(text)
    shutil.copy(DATA / "kernels.py", tmp_path)
    return tmp_path


def told(folder: Path, **environment: str) -> str:
    done = run(folder, ["fused.py"], **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_change_anywhere_is_seen_and_no_change_compiles_nothing(small: Path) -> None:
    """With njit(cache=True) instead of kernel() each of these changes prints the first number again."""
    assert told(small) == "61 0" and told(small) == "61 1"  # compiled, then from the cache
    for name, old, new, wanted in (
        ("draws.py", "x + 1", "x + 2", "71 0"),
        ("augment.py", "TOP = 1", "TOP = 3", "73 0"),
        ("pixels.py", "SCALE = 10", "SCALE = 20", "143 0"),
    ):
        stamp = (small / name).stat()
        (small / name).write_text(SMALL[name].replace(old, new))
        os.utime(small / name, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # content counts, not the time
        assert told(small) == wanted
    for name, text in SMALL.items():
        (small / name).write_text(text)
    assert told(small) == "61 1"  # what was compiled of the first content is still there


def test_folders_are_tried_in_turn(small: Path) -> None:
    chosen = small / "chosen"
    assert told(small, NUMBA_CACHE_DIR=str(chosen)) == "61 0"
    assert [path.name.partition("-")[0] for path in chosen.iterdir()] == ["dist_defend"]
    (small / "__pycache__").write_text("a file, so that no folder can be made below it")
    assert told(small) == "61 0" and told(small) == "61 1"
    assert next((small / "home" / ".cache").glob("dist_defend-*")).is_dir()


def test_without_a_folder_to_write_to_there_is_a_temporary_one(small: Path) -> None:
    blocked, scratch = small / "blocked", small / "scratch"
    (small / "__pycache__").write_text("")
    blocked.write_text("")
    scratch.mkdir()
    nowhere = {"NUMBA_CACHE_DIR": str(blocked), "HOME": str(blocked), "TMPDIR": str(scratch)}
    done = run(small, ["fused.py"], **nowhere)
    assert done.returncode == 0 and done.stdout == "61 0\n", done.stderr
    assert "no folder for compiled kernels can be written" in done.stderr and "NUMBA_CACHE_DIR" in done.stderr
    assert list(scratch.iterdir()) == []  # it ends with the process


def test_every_module_that_kernels_are_made_of_counts() -> None:
    """All of data/ that draws.py and fused.py import, directly or not, but for what holds no number."""
    seen, todo = set(), ["draws.py", "fused.py"]
    while todo:
        name = todo.pop()
        seen.add(name)
        for node in ast.walk(ast.parse((DATA / name).read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module and module.startswith("dist_defend.data."):
                file = module.removeprefix("dist_defend.data.") + ".py"
                todo += [file] if file not in seen else []
    assert seen - {"jpeg.py"} == set(kernels.SOURCES)  # decoding is not compiled
    for user in (draws, fused):
        compiled = [value for value in vars(user).values() if hasattr(value, "py_func")]
        assert compiled and "njit" not in inspect.getsource(user)
        assert all(str(kernels.cache_folder()) in value._cache._cache_path for value in compiled)


@pytest.mark.slow
def test_a_changed_source_changes_the_views(tmp_path: Path) -> None:
    """The real modules, in a copy of the package: a view that is flipped and grey, before and after a change."""
    package = shutil.copytree(DATA.parent, tmp_path / "dist_defend", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "view.py").write_text(
        "import numpy as np\n"
        "from dist_defend.data.augment import AugmentConfig, View\n"
        "from dist_defend.data.fused import empty_views, fill_views\n"
        "from dist_defend.data.pixels import Pixels\n"
        "views = [View(AugmentConfig(flip=1.0, grayscale=1.0))]\n"
        "image = np.zeros((1, 1, 2, 3), np.uint8)\n"
        "image[0, 0, 0] = 255, 0, 0\n"
        "outs = empty_views(views, 1, 1, 2)\n"
        "fill_views(outs, views, Pixels.of(image), np.zeros(1, np.int64), 0, 0)\n"
        "print(*outs[0][0, 0, :, 0].round(4))\n"
    )
    assert run(tmp_path, ["view.py"]).stdout == "0.0 0.2989\n"
    file, old = package / "data" / "draws.py", "out[FLIP] = _uniform(key, _FLIP, 0.0, 1.0) < packed[7]"
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, "out[FLIP] = 0"))
    assert run(tmp_path, ["view.py"]).stdout == "0.2989 0.0\n"
