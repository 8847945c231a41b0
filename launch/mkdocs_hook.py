"""What the documentation's pages need beside docs/: a reference of all keys, and files of the repository they link to.

mkdocs.yml names this file as a hook. The pages of keys are made from the dataclasses, as `dist-defend methods NAME` is.
"""

import html
import posixpath
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_defend import keys

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PROJECT = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")  # pages that lie at the root of the repository
KEYS = "reference/keys"
# Page of docs/methods/: the pages of keys that its end links to. Other pages have their method's name.
KEYS_OF = {
    "abd": ("zskt",),
    "attacks": ("attack", "triggers", "input_aware"),
    "distillation": ("kd", "ood", "cmi"),
    "encoder_tuning": ("ft_simclr", "nad_simclr"),
    "poisoned_pretraining": ("triggers", "simclr"),
    "tuning": ("ft", "ft_sam", "nad", "fp", "sau"),
}
_LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")
_MARKDOWN = str.maketrans({c: f"&#{ord(c)};" for c in "|*_[]`~^=+$"})


def in_html(text: str) -> str:
    """A docstring's words with ``code`` and `code` as HTML; no other character means anything to Markdown."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    parts = re.split(r"(``.+?``|`.+?`)", escaped)
    return "".join(
        f"<code>{part.strip('`').translate(_MARKDOWN)}</code>" if part.startswith("`") else part.translate(_MARKDOWN)
        for part in parts
    )


def in_code(text: str) -> str:
    """Text as it is, in HTML's code."""
    return f"<code>{html.escape(text, quote=False).translate(_MARKDOWN)}</code>"


def _prose(text: str) -> list[str]:
    return [line for block in re.split(r"\n\s*\n", text.strip()) if block for line in (in_html(block), "")]


def _table(section: type, own: bool = True) -> list[str]:
    """A section's keys, a row each. own: options of an experiment are left out, they have the method's name."""
    meanings, hints = keys.split_doc(section)[1], typing.get_type_hints(section)
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in fields(section):
        if field.name == "options" and not own:
            continue
        cells = (
            in_code(field.name),
            in_html(keys.told_type(hints[field.name])),
            in_code(keys.told_default(field)),
            in_html(meanings.get(field.name, "")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def page_of(title: str, about: str, root: type, presets: Mapping[str, Any] | None = None) -> str:
    """A page: what it is, the section's keys, each section below it once with its places, presets."""
    places: dict[type, list[str]] = {}
    for section, at in keys.sections(root):
        places.setdefault(section, []).append(at.rstrip("."))
    lines = [f"# {title}", "", *_prose(about), *_prose(keys.split_doc(root)[0]), "## The section", "", *_table(root)]
    for section, where in list(places.items())[1:]:
        lines += [f"## {' · '.join(in_code(place) for place in where)}", ""]
        lines += [*_prose(keys.split_doc(section)[0]), *_table(section)]
    if presets:
        lines += ["## Presets", "", "A preset is taken by the key `preset`. Your own keys are put over it.", ""]
        lines += ["| preset | values |", "| --- | --- |"]
        for name, options in presets.items():
            lines.append(f"| {in_code(name)} | {in_code(keys.in_yaml(options)) if options else 'the defaults'} |")
    return "\n".join(lines).rstrip() + "\n"


def key_pages() -> Iterator[tuple[str, str, str]]:
    """(path below docs/, title in the navigation, text) of each page of keys."""
    from dist_defend.attacks.added import BUILT_IN
    from dist_defend.attacks.attack import AttackConfig
    from dist_defend.config import Experiment
    from dist_defend.methods import find_method, method_names
    from dist_defend.sweep.file import SweepConfig

    yield f"{KEYS}/experiment.md", "experiment", _experiment(Experiment)
    for name in method_names():
        module = find_method(name)
        text = page_of(f"{name}: keys", module.__doc__ or "", module.Config, getattr(module, "PRESETS", None))
        yield f"{KEYS}/{name}.md", name, text
    yield f"{KEYS}/attack.md", "attack", page_of("attack: keys", "", AttackConfig)
    lines = ["# Triggers: keys", "", "The key `attack.trigger` takes one of these sections. `name` chooses which.", ""]
    for name, options in BUILT_IN.items():
        lines += [f"## {name}", "", *_prose(keys.split_doc(options)[0]), *_table(options)]
    yield f"{KEYS}/triggers.md", "triggers", "\n".join(lines)
    yield f"{KEYS}/sweep.md", "sweep", page_of("Sweep file: keys", "", SweepConfig)


def _experiment(experiment: type) -> str:
    about = "These keys stand beside the method's section in every experiment file. The section has the method's name."
    text = page_of("Experiment: keys", about, experiment)
    return text.replace("\n".join(_table(experiment)), "\n".join(_table(experiment, own=False)))


def place_of(path: str) -> str:
    """Where a file of the repository lies in the site's sources."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"project/{path}" if path in PROJECT else f"repository/{path}"


def links(text: str, path: str) -> Iterator[str]:
    """Files of the repository that a page at ``path`` links to."""
    for _, target, _ in _LINK.findall(text):
        found = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if not found.startswith("..") and (ROOT / found).is_file():
            yield found


def with_site_links(text: str, path: str) -> str:
    """The page's text, with links to files of the repository as links within the site."""
    here = posixpath.dirname(place_of(path))

    def moved(match: re.Match[str]) -> str:
        found = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[2]))
        if found.startswith("..") or not (ROOT / found).is_file():
            return match[0]
        return f"{match[1]}{posixpath.relpath(place_of(found), here or '.')}{match[3]}"

    return _LINK.sub(moved, text)


def _repository_path(src_uri: str) -> str:
    first, _, rest = src_uri.partition("/")
    return rest if first in ("project", "repository") else f"docs/{src_uri}"


def on_config(config: "MkDocsConfig") -> "MkDocsConfig":
    """Add the pages of keys to the navigation, below the entry named Keys."""
    pages = [{title: path} for path, title, _ in key_pages()]
    for entry in config.nav or ():
        for part in next(iter(entry.values())) if isinstance(entry, dict) else ():
            if isinstance(part, dict) and "Keys" in part:
                part["Keys"] = pages
    return config


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the pages of keys, the project's pages, and what pages link to outside of docs/."""
    from mkdocs.structure.files import File

    for path, _, text in key_pages():
        files.append(File.generated(config, path, content=text))
    waiting = list(PROJECT) + [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    seen = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not (ROOT / path).is_file():
            continue
        seen.add(path)
        if not path.startswith("docs/"):
            files.append(File.generated(config, place_of(path), abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            waiting += links((ROOT / path).read_text(encoding="utf-8"), path)
    return files


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Links of a page to files of the repository lead to their places in the site."""
    path = _repository_path(page.file.src_uri)
    text = with_site_links(markdown, path) if (ROOT / path).is_file() else markdown
    return text + settings(page.file.src_uri)


def settings(src_uri: str) -> str:
    """The end of a method's page: where its keys, defaults and presets are told. Nothing for other pages."""
    folder, _, name = src_uri.removesuffix(".md").partition("/")
    if folder != "methods":
        return ""
    names = KEYS_OF.get(name, (name,))
    listed = ", ".join(f"[{one}](../{KEYS}/{one}.md)" for one in names)
    return f"\n\n## Settings\nAll keys with their defaults and meanings: {listed}.\n"
