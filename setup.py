"""Package and dependencies. Ranges only: launch/constraints*.txt name the versions that were tested together.

The folders that users edit (TEMPLATES) lie at the root of the repository once; a wheel gets them as package data.

A lower bound is what is needed, or the first version without a known advisory: SECURITY.md lists these.
"""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

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
    "peers": ["lightly>=1.5"],  # what `bench peers` compares with
    "complete": ["argcomplete>=3.5"],  # the shell's completion of commands, options, files and keys
    "hub": ["huggingface_hub>=0.34"],  # what `dist-defend push` sends with; timm brings it too
    "sweep": ["pandas", "pyarrow>=23.0.1"],  # tables of many runs
    "docs": ["mkdocs>=1.6", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.28"],  # make docs
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
        # Its interpreter runs the kernels on a CPU. Beside a GPU torch brings its own version.
        "triton>=3.3; sys_platform == 'linux' and platform_machine == 'x86_64'",
    ],
}

TEMPLATES = ("configs", "launch/accelerate", "launch/deepspeed", "launch/torchvision_hook.py", "slurm")
PAPERS = {"BadEncoder": "2108.00352", "I-BAU": "2110.03735", "RNP": "2305.14876", "ABD": "2306.02368"}  # on arXiv


class BuildWithTemplates(build_py):  # type: ignore[misc]  # setuptools has no types
    """Copies TEMPLATES into the built package; an installation with --editable reads them where they are."""

    def run(self) -> None:
        """As setuptools', then the copies."""
        super().run()
        if self.editable_mode:
            return
        for part in TEMPLATES:
            source, place = HERE / part, Path(self.build_lib, "dist_defend", "templates", part)
            if source.is_dir():
                shutil.rmtree(place, ignore_errors=True)  # of an earlier build
                shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, place)


setup(
    name="dist-defend",
    version=VERSION[1],
    description="Train, poison, purify and measure image encoders and classifiers, on one CPU or many GPUs",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords="backdoor, data poisoning, trojan, defence, unlearning, pruning, distillation, self-supervised, PyTorch",
    project_urls={name: f"https://arxiv.org/abs/{number}" for name, number in PAPERS.items()},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Security",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["dist_defend", "dist_defend.*"]),
    package_data={"dist_defend": ["py.typed", "*.pyi"], "dist_defend.report": ["*.html", "*.css", "*.js"]},
    cmdclass={"build_py": BuildWithTemplates},
    install_requires=CORE,
    extras_require={
        **EXTRAS,
        "all": sorted(n for extra, names in EXTRAS.items() if extra not in ("docs", "peers", "test") for n in names),
    },
    entry_points={"console_scripts": ["dist-defend = dist_defend.__main__:main"]},
)
