"""Prepared data sets that lie: a manifest that vouches for whatever lies in the folder."""

import hashlib
import json
from pathlib import Path
from typing import Any


def seal(folder: Path, **changes: Any) -> None:
    """Write the present sizes and sha256s of its files into a folder's manifest, and change keys of it."""
    place = folder / "manifest.json"
    content = json.loads(place.read_text())
    for name in content["files"]:
        data = (folder / name).read_bytes()
        content["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    place.write_text(json.dumps(content | changes))
