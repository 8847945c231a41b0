"""README.md: its order, its links and pictures, its sample output; CITATION.cff and what it repeats."""

import re
from pathlib import Path

import yaml

from dist_defend import __version__

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CITED = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
TYPES = {"article", "conference-paper"}


def test_the_order_of_the_page() -> None:
    title, sentence, picture = [block for block in README.split("\n\n") if block][:3]
    assert title == "# dist_defend" and sentence.count(".") == 1 and picture.startswith("![")
    headings = re.findall(r"^## (.+)$", README, re.MULTILINE)
    assert headings == ["The demo", "Five minutes", "What it can do", "Install", "Cite", "Links"]


def test_every_link_leads_to_a_file() -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", README)
    here = [target.partition("#")[0] for target in targets if "://" not in target]
    assert len(here) > 40 and [target for target in here if target and not (ROOT / target).exists()] == []
    anchors = {heading.lower().replace(" ", "-") for heading in re.findall(r"^##+ (.+)$", README, re.MULTILINE)}
    assert {target[1:] for target in targets if target.startswith("#")} <= anchors


def test_every_method_is_named_in_full() -> None:
    named = README.partition("The names in full:")[2]
    first = " ".join(re.findall(r"^\| ([^|]+) \|", named, re.MULTILINE))
    for name in re.findall(r"\| defences of (?:classifiers|encoders) \| ([^|]+) \|", README):
        for method in re.findall(r"[A-Z][\w-]*[A-Z][\w-]*", name):
            assert re.search(rf"(?<![\w-]){method}(?![\w-])", first), method


def test_the_citation_has_what_the_format_asks_for() -> None:
    """Citation File Format 1.2.0: required keys, and those of each reference."""
    assert {"cff-version", "message", "title", "authors"} <= CITED.keys() and CITED["cff-version"] == "1.2.0"
    assert all(set(author) == {"name"} for author in CITED["authors"])
    assert CITED["type"] == "software" and CITED["license"] == "Apache-2.0" and CITED["version"] == __version__
    for reference in CITED["references"]:
        assert {"type", "title", "authors"} <= reference.keys() and reference["type"] in TYPES
        assert all(set(author) == {"family-names", "given-names"} for author in reference["authors"])
        assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", reference["url"])


def test_the_readme_cites_the_same() -> None:
    entry = dict(re.findall(r"^  (\w+) += \{+(.+?)\}+,?$", README, re.MULTILINE))
    plain = {key: value.replace("\\", "") for key, value in entry.items()}
    assert plain == {
        "title": CITED["title"],
        "author": CITED["authors"][0]["name"],
        "version": __version__,
        "license": CITED["license"],
    }
