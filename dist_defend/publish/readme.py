"""The model card of an exported model: README.md with the metadata that the hub of Hugging Face reads."""

import json
from collections.abc import Mapping
from typing import Any

from dist_defend.models.artifact import ModelCard
from dist_defend.screen import markdown, printable
from dist_defend.strict_yaml import dump_yaml

_MEASURES = {
    "acc": "ACC: clean images classified as their label",
    "asr": "ASR: triggered images of other classes classified as the target",
    "asr_all": "ASR-all: all triggered images classified as the target",
    "ra": "RA: triggered images of other classes classified as their label",
}
_MOST = 4000  # characters of what the card keeps beside


def readme(title: str, card: ModelCard, config: dict[str, Any], timm_name: str | None, counts: dict[str, Any]) -> str:
    """The file's text. What comes from the card is shown, and acts neither as markup nor as metadata."""
    parts = [f"---\n{dump_yaml(_metadata(card, timm_name))}---", f"# {markdown(title)}", *_warnings(card, counts)]
    parts += ["## Model", _table(["", ""], _facts(card, config))]
    if counts:
        parts += ["## Measured", _table(["", *_columns(counts)], _rates(counts)), _TOLD]
    parts += ["## Load", _code(_loading(card, timm_name))]
    if card.attack:
        parts += ["## The attack it was tested with", _code(json.dumps(card.attack, indent=1))]
    origin = {"parent_sha256": card.parent_sha256, "defended_by": card.defended_by, "chosen_by": card.chosen_by}
    known = {key: value for key, value in {**origin, "provenance": card.provenance}.items() if value}
    if known:
        parts += ["## Where it comes from", _code(json.dumps(known, indent=1)[:_MOST])]
    return "\n\n".join(parts) + "\n"


_TOLD = "Each rate is a count of test images, with the number that counted. Rates under another attack are not known."


def _metadata(card: ModelCard, timm_name: str | None) -> dict[str, Any]:
    is_classifier = card.kind == "classifier"
    state = ["backdoored"] if card.backdoored else []
    defence = ["backdoor-defense"] if card.defended_by else []
    return {
        "library_name": "timm" if timm_name else "dist_defend",
        "pipeline_tag": "image-classification" if is_classifier else "image-feature-extraction",
        "tags": [*(["timm"] if timm_name else []), "dist_defend", "backdoor", *state, *defence],
        **({"metrics": ["accuracy"]} if is_classifier else {}),
    }


def _warnings(card: ModelCard, counts: dict[str, Any]) -> list[str]:
    """What must be read first: that the model is backdoored, or was, and what nobody has told of it."""
    found = []
    if card.backdoored:
        found.append(
            "**Warning: this model is BACKDOORED.** On images with its trigger it does what an attacker wants. It is "
            "here for research on defences; do not use it for anything else."
        )
    elif card.attack:
        asr = counts.get("after", {}).get("asr")
        left = f" An attack success rate of {_percent(asr)} is left." if card.defended_by and asr and asr["n"] else ""
        by = f" {markdown(card.defended_by)} was to remove it." if card.defended_by else ""
        found.append(f"**Warning: this model had a backdoor.**{by}{left} Other triggers were not tried.")
    if card.guessed:
        found.append(
            f"**Guessed, not known:** {markdown(', '.join(card.guessed))}. Numbers mean little if it is wrong."
        )
    return [f"> {line}" for line in found]


def _facts(card: ModelCard, config: dict[str, Any]) -> list[list[str]]:
    """Rows of names and values."""
    images = config.get("pretrained_cfg", config)
    numbers = [" ".join(f"{number:g}" for number in images[key]) for key in ("mean", "std")]
    rows = [["kind", "classifier" if card.kind == "classifier" else "encoder"], ["architecture", card.arch]]
    rows += [["images", f"RGB, {card.image_size} px, in 0 to 1, then (x - mean) / std"]]
    if card.resize:
        rows.append(["resize", f"to {card.resize} px, bilinear with antialias, before the network"])
    rows += [["mean", numbers[0]], ["std", numbers[1]]]
    size = f"{card.num_classes} classes" if card.kind == "classifier" else f"{card.feature_dim} features"
    rows.append(["gives", size])
    if card.classes:
        rows.append(["classes", ", ".join(card.classes)])
    return rows


def _columns(counts: Mapping[str, Any]) -> list[str]:
    return ["before the defence", "after it"] if "before" in counts else ["this model"]


def _rates(counts: Mapping[str, Any]) -> list[list[str]]:
    """A row for each measure that any column has counted."""
    columns = [counts[when] for when in ("before", "after") if when in counts]
    return [
        [meaning, *(_percent(column.get(name)) for column in columns)]
        for name, meaning in _MEASURES.items()
        if any(column.get(name, {}).get("n") for column in columns)
    ]


def _percent(count: Mapping[str, int] | None) -> str:
    return f"{100 * count['correct'] / count['n']:.2f} % of {count['n']}" if count and count["n"] else "not measured"


def _loading(card: ModelCard, timm_name: str | None) -> str:
    if timm_name:
        made = "logits" if card.kind == "classifier" else "features"
        resized = f"resized to {card.resize} px, " if card.resize else ""
        return (
            "import timm\n\n"
            'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"\n'
            f"{made} = model((images - mean) / std)  # images (B, 3, H, W) in [0, 1], {resized}mean and std as above"
        )
    given = f"normalization={card.normalization!r}, image_size={card.image_size}, resize={card.resize}"
    if card.kind == "classifier":
        called = f"build_classifier({card.arch!r}, num_classes={card.num_classes}, {given})"
        made = f"from dist_defend.models.classifier import build_classifier\n\nmodel = {called}"
        load = 'model.net.load_state_dict(load_file("FOLDER/model.safetensors"))'
    else:
        made = f"from dist_defend.models.encoder import build_encoder\n\nmodel = build_encoder({card.arch!r}, {given})"
        load = 'model.f.load_state_dict(load_file("FOLDER/model.safetensors"))'
    return f"from safetensors.torch import load_file\n{made}\n{load}\nmodel.eval()(images)  # (B, 3, H, W) in [0, 1]"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([markdown(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str) -> str:
    """Set in by four spaces: no text ends it, as a fence could be ended."""
    return "\n".join(f"    {printable(line)}" for line in text.split("\n"))
