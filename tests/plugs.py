"""Distributions with entry points, as an installer leaves them, for tests of plug-ins."""

import textwrap
from pathlib import Path


def write_distribution(folder: Path, name: str, entries: dict[str, dict[str, str]], modules: dict[str, str]) -> Path:
    """``folder`` with NAME-1.5.dist-info and modules; entries: kind of plug-in -> name -> target."""
    info = folder / f"{name.replace('-', '_')}-1.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
    groups = [
        "\n".join([f"[dist_defend.{kind}]", *(f"{key} = {value}" for key, value in own.items())])
        for kind, own in entries.items()
    ]
    (info / "entry_points.txt").write_text("\n\n".join(groups) + "\n")
    for module, code in modules.items():
        (folder / f"{module}.py").write_text(textwrap.dedent(code))
    return folder
