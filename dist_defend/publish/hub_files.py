"""The names of an exported folder's files, and what its README.md says of the model."""

from pathlib import Path

from dist_defend.files import read_regular
from dist_defend.strict_yaml import parse_yaml

FILES = ("README.md", "config.json", "model.safetensors")
_MOST_BYTES = 1 << 20


def is_backdoored(folder: Path) -> bool:
    """Whether the metadata of README.md has the tag. UserError for metadata that are none."""
    text = read_regular(folder / "README.md", _MOST_BYTES).decode("utf-8", "replace")
    metadata = parse_yaml(text.partition("---\n")[2].partition("\n---")[0], str(folder / "README.md"))
    tags = metadata.get("tags", []) if isinstance(metadata, dict) else []
    return isinstance(tags, list) and "backdoored" in tags
