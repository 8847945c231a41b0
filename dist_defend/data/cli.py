"""dist-defend data prepare | info."""

import argparse
from pathlib import Path

from dist_defend.attacks.trigger import Trigger
from dist_defend.data.classes import tell_uniform_batches
from dist_defend.data.sheet import contact_sheet
from dist_defend.data.sources import KINDS, Keys, open_source, source_splits
from dist_defend.data.store import PreparedDataset, WriteOptions, open_dataset, write_splits
from dist_defend.errors import UserError
from dist_defend.screen import printable

_LOOKED_AT = 64  # images of a batch, to see whether the order is fair


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fill the command's parser."""
    commands = parser.add_subparsers(title="data commands", required=True, metavar="COMMAND")
    prepare = commands.add_parser("prepare", help="turn a source into a prepared data set with a manifest")
    add = prepare.add_argument
    add("kind", choices=KINDS)
    add("--out", required=True, type=Path, help="folder; each split gets its own folder in it")
    add("--path", help="where the source lies (or may be downloaded to)")
    add("--images", metavar="KEY", help="npz: the array of images; beton: the field; webdataset: the ending")
    add("--labels", metavar="KEY", help="the same for labels; webdataset: the ending, or the key in .json")
    add("--split", default="all", help="train, test, unlabeled, ... or all that there are (default)")
    add("--image-size", type=_positive, metavar="PIXELS", help="resize to a square")
    add("--write-mode", choices=("raw", "jpg"), default="raw")
    add("--max-resolution", type=_positive, metavar="PIXELS", help="shrink to at most this long a side")
    add("--quality", type=int, choices=range(1, 101), default=90, metavar="1..100", help="of a JPEG that is made")
    add("--storage", choices=("auto", "beton", "npy"), default="auto")
    order = prepare.add_mutually_exclusive_group()
    order.add_argument(
        "--order-seed", type=_not_negative, default=0, metavar="N", help="of the shuffled order of the rows (default 0)"
    )
    order.add_argument("--keep-order", action="store_true", help="keep the source's order, which may be one by class")
    add("--max-samples", type=_positive, metavar="N", help="only the first N of each split, in the order of its rows")
    add(
        "--skip-broken", type=_not_negative, default=0, metavar="N", help="leave out up to N images that cannot be read"
    )
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


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _prepare(args: argparse.Namespace) -> int:
    keys = Keys(args.images, args.labels)
    splits = source_splits(args.kind, args.path, keys) if args.split == "all" else [args.split]
    options = WriteOptions(
        write_mode=args.write_mode,
        image_size=args.image_size,
        max_resolution=args.max_resolution,
        quality=args.quality,
        storage=args.storage,
        max_samples=args.max_samples,
        order_seed=None if args.keep_order else args.order_seed,
        skip_broken=args.skip_broken,
    )
    sources = {split: open_source(args.kind, args.path, split, keys) for split in splits}
    places = {split: args.out / split for split in splits}
    for dataset in write_splits(sources, places, name=args.kind, options=options):
        print(_describe(dataset))
        _print_remarks(dataset)
    return 0


def _print_remarks(dataset: PreparedDataset) -> None:
    """The order of the rows, what the source noted, and what was left out."""
    manifest = dataset.manifest
    order = "the source's" if manifest.order_seed is None else f"shuffled, seed {manifest.order_seed}"
    print(f"  order of the rows: {order}")
    if manifest.source_samples is not None and manifest.source_samples > len(dataset) + len(manifest.skipped):
        print(f"  these are the first {len(dataset)} of {manifest.source_samples} images in this order")
    for note in manifest.notes:
        print(f"  note: {printable(note)}")
    for name in manifest.skipped:
        print(f"  left out, cannot be read: {printable(name)}")
    if any(manifest.class_counts) and 0 in manifest.class_counts:
        empty = [name for name, count in zip(manifest.classes, manifest.class_counts, strict=True) if not count]
        shown = f"{printable(', '.join(empty[:10]), 500)}{' ...' if len(empty) > 10 else ''}"
        print(f"  classes without an image here: {len(empty)} of {len(manifest.classes)}: {shown}")
    uniform = tell_uniform_batches(dataset.labels, _LOOKED_AT)
    if uniform is not None:
        print(f"  the order is no random one: {uniform}")


def _describe(dataset: PreparedDataset) -> str:
    manifest = dataset.manifest
    shape = "x".join(map(str, manifest.image_shape)) if manifest.image_shape else "of several sizes"
    size = sum(file.bytes for file in manifest.files.values()) / 2**20
    return (
        f"{printable(dataset.path)}: {manifest.num_samples} images {shape}, {len(manifest.classes)} classes, "
        f"{', '.join(sorted(manifest.files))} ({manifest.write_mode}, {size:.1f} MiB), sha256 {dataset.digest[:16]}"
    )


def _info(args: argparse.Namespace) -> int:
    dataset = open_dataset(args.dataset)
    triggers = _triggers(dataset, args.trigger) if args.trigger else []
    if args.verify:
        dataset.verify()
    print(_describe(dataset))
    _print_remarks(dataset)
    for name, count in zip(dataset.classes, dataset.manifest.class_counts, strict=True):
        print(f"  {count:8d}  {printable(name, 200)}")
    if args.verify:
        print("verified: every file has the sha256 that manifest.json gives")
    path = args.sheet or dataset.path / "contact_sheet.png"
    try:
        contact_sheet(dataset, triggers).save(path, format="PNG")
    except OSError as error:
        raise UserError(f"{path}: cannot write the contact sheet ({error.strerror}); choose another --sheet") from error
    print(f"contact sheet{' with and without trigger' if triggers else ''}: {path}")
    return 0


def _triggers(dataset: PreparedDataset, path: str) -> list[Trigger]:
    from dist_defend.attacks.own_trigger import FromFile
    from dist_defend.attacks.poison import image_size_of

    return FromFile(path).build_each(image_size_of(dataset))
