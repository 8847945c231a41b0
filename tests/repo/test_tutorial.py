"""The code on the page that builds the example plug-in is the example plug-in's."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/plugin"
PAGE = (ROOT / "docs/tutorials/add-a-defence.md").read_text()
BLOCK = re.compile(r"^```\w+ (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def lines(text: str) -> list[str]:
    """Without empty ones, which also stand between two blocks."""
    return [line for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("file", ["example_plugin/fine_tune.py", "pyproject.toml", "fine_tune.yaml"])
def test_the_blocks_of_a_file_are_the_file(file: str) -> None:
    blocks = [text for name, text in BLOCK.findall(PAGE) if name == file]
    assert blocks and lines("".join(blocks)) == lines((EXAMPLE / file).read_text())


def test_no_block_is_of_another_file() -> None:
    assert {name for name, _ in BLOCK.findall(PAGE)} == {
        "example_plugin/fine_tune.py",
        "pyproject.toml",
        "fine_tune.yaml",
    }
    assert PAGE.count("```") == 2 * len(BLOCK.findall(PAGE))


def test_the_pages_name_every_entry_point_group() -> None:
    groups = set(re.findall(r'entry-points\."([\w.]+)"', (EXAMPLE / "pyproject.toml").read_text()))
    assert groups == {f"dist_defend.{kind}" for kind in ("methods", "triggers", "architectures", "normalizations")}
    assert all(group in (ROOT / "docs/plugins.md").read_text() for group in groups)
