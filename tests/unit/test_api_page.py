"""The examples of docs/api.md run, in their order."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/api.md"


def test_the_examples_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) == 9
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        lines = "\n" * text[: block.start(1)].count("\n")  # so that a failure names the page's line
        exec(compile(lines + block[1], str(PAGE), "exec"), names)
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "purified", "theirs.pth", "models"}
    assert "->" in capsys.readouterr().out
    named = set(re.findall(r"^## (\w+)(?: and (\w+))?$", text, re.MULTILINE))
    assert {name for pair in named for name in pair} >= {
        "attack",
        "defend",
        "evaluate",
        "load",
        "save",
        "train",
        "wrap",
    }
