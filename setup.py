"""Package and dependencies. Ranges only: launch/constraints*.txt name the versions that were tested together.

A lower bound is what is needed, or the first version without a known advisory: SECURITY.md lists these.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "dist_defend/__init__.py").read_text(), re.MULTILINE)
if VERSION is None:
    raise SystemExit("setup.py: dist_defend/__init__.py names no __version__")

CORE = [
    "torch>=2.10",
    "torchvision",  # unpinned: each release of it pins the one torch it belongs to
    "timm>=1.0.15",
    "accelerate>=1.10",
    "numpy",
    "numba",
    "scikit-learn>=1.5",
    "pillow>=12.3",
    "safetensors",
    "pyyaml>=6.0",
    "dacite",
    "tqdm>=4.66.3",
    "tensorboard",
    "matplotlib",
    "jinja2>=3.1.6",
    "psutil>=5.6.6",
    # What the above bring along (torch, tensorboard, matplotlib); named for the lower bounds alone.
    "filelock>=3.20.3",
    "fonttools>=4.61",
    "markdown>=3.8.1",
    "protobuf>=6.33.5",
    "werkzeug>=3.1.6",
]
EXTRAS = {
    # Built from source: needs a C++ compiler, pkg-config, OpenCV 4 and libturbojpeg. It imports distutils, and Pillow
    # without declaring it. Its traversal-order interface changed after 1.0.2, hence the exact version.
    "ffcv": ["ffcv==1.0.2", "setuptools>=78.1.1; python_version >= '3.12'"],
    "clip": ["open_clip_torch>=3.0"],  # CLIP's towers and tokenizer
    "deepspeed": ["deepspeed>=0.16", "transformers>=5.3"],  # accelerate's DeepSpeedPlugin imports transformers
    "sweep": ["pandas", "pyarrow>=23.0.1"],  # tables of many runs
    "test": [
        "pytest>=9.0.3",
        "pytest-timeout",
        "pytest-xdist",
        "nbclient",  # runs examples/*.ipynb
        "ipykernel",
        "ruff",
        "mypy",
        "pandas-stubs",
        "types-PyYAML",
        "types-psutil",
        "types-tqdm",
    ],
}

setup(
    name="dist-defend",
    version=VERSION[1],
    description="Train, poison, purify and measure image encoders and classifiers, on one CPU or many GPUs",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["dist_defend", "dist_defend.*"]),
    package_data={"dist_defend": ["py.typed", "*.pyi"], "dist_defend.report": ["*.html", "*.css"]},
    install_requires=CORE,
    extras_require={**EXTRAS, "all": sorted({name for names in EXTRAS.values() for name in names})},
    entry_points={"console_scripts": ["dist-defend = dist_defend.cli:main"]},
)
