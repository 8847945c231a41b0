"""dist-defend data prepare | info."""

import argparse
from pathlib import Path

import numpy as np
import torch

from dist_defend.data.sheet import Stamp, contact_sheet
from dist_defend.data.sources import KINDS, Keys, open_source, source_splits
from dist_defend.data.store import PreparedDataset, open_dataset, write_dataset
from dist_defend.errors import UserError


def add_arguments(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to dist-defend's parser."""
    data = subparsers.add_parser("data", help="prepare data sets and look at them")
    commands = data.add_subparsers(title="data commands", required=True, metavar="COMMAND")
    prepare = commands.add_parser("prepare", help="turn a source into a prepared data set with a manifest")
    prepare.add_argument("kind", choices=KINDS)
    prepare.add_argument("--out", required=True, type=Path, help="folder; each split gets its own folder in it")
    prepare.add_argument("--path", help="where the source lies (or may be downloaded to)")
    prepare.add_argument(
        "--images", metavar="KEY", help="npz: the array of images; beton: the field; webdataset: the ending"
    )
    prepare.add_argument(
        "--labels", metavar="KEY", help="the same for labels; webdataset: the ending, or the key in .json"
    )
    prepare.add_argument("--split", default="all", help="train, test, unlabeled, ... or all that there are (default)")
    prepare.add_argument("--image-size", type=_positive, metavar="PIXELS", help="resize to a square")
    prepare.add_argument("--write-mode", choices=("raw", "jpg"), default="raw")
    prepare.add_argument(
        "--max-resolution", type=_positive, metavar="PIXELS", help="shrink to at most this long a side"
    )
    prepare.add_argument("--quality", type=int, choices=range(1, 101), default=90, metavar="1..100", help="of a JPEG")
    prepare.add_argument("--storage", choices=("auto", "beton", "npy"), default="auto")
    prepare.add_argument("--max-samples", type=_positive, metavar="N", help="only the first N of each split")
    prepare.set_defaults(main=_prepare)
    info = commands.add_parser("info", help="print a data set's manifest and draw a contact sheet")
    info.add_argument("dataset", help="folder of one split")
    info.add_argument("--verify", action="store_true", help="hash the files too")
    info.add_argument(
        "--trigger", metavar="FILE", help="show the images with this trigger (npz or picture) beside those without"
    )
    info.add_argument("--sheet", metavar="OUT.png", type=Path, help="where to write the contact sheet")
    info.set_defaults(main=_info)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _prepare(args: argparse.Namespace) -> int:
    keys = Keys(args.images, args.labels)
    splits = source_splits(args.kind, args.path, keys) if args.split == "all" else [args.split]
    for split in splits:
        dataset = write_dataset(
            open_source(args.kind, args.path, split, keys),
            args.out / split,
            name=args.kind,
            split=split,
            write_mode=args.write_mode,
            image_size=args.image_size,
            max_resolution=args.max_resolution,
            quality=args.quality,
            storage=args.storage,
            max_samples=args.max_samples,
        )
        print(_describe(dataset))
    return 0


def _describe(dataset: PreparedDataset) -> str:
    manifest = dataset.manifest
    shape = "x".join(map(str, manifest.image_shape)) if manifest.image_shape else "of several sizes"
    size = sum(file.bytes for file in manifest.files.values()) / 2**20
    return (
        f"{dataset.path}: {manifest.num_samples} images {shape}, {len(manifest.classes)} classes, "
        f"{', '.join(sorted(manifest.files))} ({manifest.write_mode}, {size:.1f} MiB), sha256 {dataset.digest[:16]}"
    )


def _info(args: argparse.Namespace) -> int:
    dataset = open_dataset(args.dataset)
    stamps = _stamps(dataset, args.trigger) if args.trigger else []
    if args.verify:
        dataset.verify()
    print(_describe(dataset))
    for name, count in zip(dataset.classes, dataset.manifest.class_counts, strict=True):
        print(f"  {count:8d}  {name}")
    if args.verify:
        print("verified: every file has the sha256 that manifest.json gives")
    path = args.sheet or dataset.path / "contact_sheet.png"
    try:
        contact_sheet(dataset, stamps).save(path, format="PNG")
    except OSError as error:
        raise UserError(f"{path}: cannot write the contact sheet ({error.strerror}); choose another --sheet") from error
    print(f"contact sheet{' with and without trigger' if stamps else ''}: {path}")
    return 0


def _stamps(dataset: PreparedDataset, path: str) -> list[Stamp]:
    from dist_defend.attacks.poison import image_size_of
    from dist_defend.attacks.reference import TriggerConfig, triggers_from
    from dist_defend.attacks.trigger import Trigger, check_size, load_triggers
    from dist_defend.data.pictures import is_picture

    if dataset.image_shape is None:
        raise UserError(f"{dataset.path}: images differ in size, so no trigger fits; prepare it with --image-size")

    def stamp_with(trigger: Trigger) -> Stamp:
        def stamp(image: np.ndarray) -> np.ndarray:
            pixels = torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)[None]
            return (trigger(pixels)[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()

        return stamp

    triggers = triggers_from(TriggerConfig(path), image_size_of(dataset)) if is_picture(path) else load_triggers(path)
    for trigger in triggers:
        check_size(trigger, dataset.image_shape[:2], path)
    return [stamp_with(trigger) for trigger in triggers]
