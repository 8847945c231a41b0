"""The documentation's site: the reference names every key, and the strict build has no warning, such as a dead link."""

import dataclasses
import html
import importlib.util
import os
import re
import runpy
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_defend import keys
from dist_defend.attacks.added import BUILT_IN
from dist_defend.attacks.attack import AttackConfig
from dist_defend.config import Experiment
from dist_defend.methods import find_method, method_names
from dist_defend.sweep.file import SweepConfig

ROOT = Path(__file__).parents[2]
HOOK = runpy.run_path(str(ROOT / "launch/mkdocs_hook.py"))
PAGES = {title: text for _, title, text in HOOK["key_pages"]()}
ROOTS: dict[str, Any] = {
    "experiment": Experiment,
    "attack": AttackConfig,
    "sweep": SweepConfig,
    **{name: find_method(name).Config for name in method_names()},
}


def rows(text: str) -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of each row of a page's tables, as a reader sees them."""
    for line in text.splitlines():
        cells = [re.sub(r"</?code>", "", cell).strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 4 and cells[0] not in ("key", "---"):
            yield tuple(html.unescape(cell) for cell in cells)  # type: ignore[misc]


def expected(section: type) -> Iterator[tuple[str, str, str, str]]:
    meanings = keys.split_doc(section)[1]
    for field in dataclasses.fields(section):
        if (section, field.name) != (Experiment, "options"):  # the method's section, which has its own page
            meaning = re.sub(r"`+", "", " ".join(meanings[field.name].split()))
            hint = typing.get_type_hints(section)[field.name]
            yield field.name, keys.told_type(hint), keys.told_default(field), meaning


@pytest.mark.parametrize("name", ROOTS)
def test_every_key_of_every_section_is_in_the_reference(name: str) -> None:
    shown = list(rows(PAGES[name]))
    for section in dict.fromkeys(section for section, _ in keys.sections(ROOTS[name])):
        missing = [row for row in expected(section) if row not in shown]
        assert missing == [], section.__qualname__
        shown = [row for row in shown if row not in list(expected(section))]
    assert shown == []


def reachable(hint: Any) -> Iterator[type]:
    """Every dataclass that a value of this type may be or hold, by a walk of its own; through unions of several too."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        yield hint
        for inner in typing.get_type_hints(hint).values():
            yield from reachable(inner)
    for inner in typing.get_args(hint):
        yield from reachable(inner)


def test_no_section_is_left_out() -> None:
    everywhere = {row for text in PAGES.values() for row in rows(text)}
    for root in ROOTS.values():
        for section in set(reachable(root)):
            missing = [row for row in expected(section) if row not in everywhere]
            assert missing == [], section.__qualname__


def test_every_trigger_is_in_the_reference() -> None:
    parts = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", PAGES["triggers"], re.MULTILINE | re.DOTALL))
    assert {name: list(rows(text)) for name, text in parts.items()} == {
        name: list(expected(options)) for name, options in BUILT_IN.items()
    }


def test_every_preset_is_in_the_reference() -> None:
    for name in method_names():
        found = re.findall(r"^\| <code>(.+?)</code> \| ", PAGES[name].partition("## Presets")[2], re.MULTILINE)
        assert [html.unescape(preset) for preset in found] == list(getattr(find_method(name), "PRESETS", {}))


def test_every_method_has_a_page_that_leads_to_its_keys() -> None:
    pages = [file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs/methods").glob("*.md")]
    linked = [name for page in pages for name in re.findall(r"\[(\w+)\]", HOOK["settings"](page))]
    assert set(linked) == {*method_names(), "attack", "triggers"} and HOOK["settings"]("data.md") == ""


@pytest.mark.parametrize(
    ("link", "path", "wanted"),
    [
        ("[a](../SECURITY.md)", "docs/plugins.md", "[a](project/SECURITY.md)"),
        ("[a](docs/data.md#npz)", "CONTRIBUTING.md", "[a](../data.md#npz)"),
        ("[a](../configs/start/poison.yaml)", "docs/sweeps.md", "[a](repository/configs/start/poison.yaml)"),
        ("[a](data.md)", "docs/models.md", "[a](data.md)"),
        ("[a](nothing.md)", "docs/models.md", "[a](nothing.md)"),  # left for the build to find
        ("[a](https://arxiv.org/abs/1)", "docs/models.md", "[a](https://arxiv.org/abs/1)"),
    ],
)
def test_links_out_of_docs_lead_to_pages_of_the_site(link: str, path: str, wanted: str) -> None:
    assert HOOK["with_site_links"](link, path) == wanted


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("mkdocs") is None and not os.environ.get("CI"):
        pytest.skip("the extra docs is not installed")
    folder = tmp_path_factory.mktemp("docs") / "site"
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def articles(site: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(site.rglob("*.html")):
        text = file.read_text(encoding="utf-8")
        article = text[text.find("<article") : text.find("</article>")]
        yield file.relative_to(site).as_posix(), re.sub(r"<pre.*?</pre>", "", article, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.timeout(900)  # fifteen seconds of a CPU that others may use
def test_the_site_is_built_without_a_warning(site: Path) -> None:
    names = dict(articles(site))
    for name in ROOTS:
        assert f"reference/keys/{name}.html" in names
    assert {"index.html", "concepts.html", "reference/python.html", "project/SECURITY.html", "results.html"} <= set(
        names
    )
    assert "def</span>" in names["reference/python.html"] or "dist_defend.api.wrap" in names["reference/python.html"]
    assert (site / "pictures/data_way.svg").is_file()


# A list or table that follows a line of text without an empty line between is no list for Markdown's first dialect.
RAW = re.compile(r"<p>(?:(?!</p>).)*\n\s*(?:[-*] |\d+\. |\|)", re.DOTALL)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_lists_and_tables_are_shown_as_such(site: Path) -> None:
    assert [name for name, text in articles(site) if RAW.search(text) and name != "results.html"] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_page_asks_another_host_for_anything(site: Path) -> None:
    loads = re.compile(
        r"<(?:script|img|iframe|source)[^>]* src=[\"'](?:https?:)?//|<link[^>]* href=[\"'](?:https?:)?//"
    )
    found = [file.name for file in site.rglob("*.html") if loads.search(file.read_text(encoding="utf-8"))]
    assert found == []
