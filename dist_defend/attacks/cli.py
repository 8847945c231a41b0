"""dist-defend attacks [NAME]: all triggers with their source, or one's keys; and attacks gallery | trojan-nn."""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from dist_defend import keys
from dist_defend.attacks.added import BUILT_IN, find_options, trigger_names, trigger_sources
from dist_defend.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fill the command's parser."""
    parser.set_defaults(main=_list, shown=None)
    commands = parser.add_subparsers(title="a trigger, to see its keys, or a command", metavar="NAME")
    for name in trigger_names():
        commands.add_parser(name).set_defaults(main=_list, shown=name)
    gallery = commands.add_parser("gallery", help="one PNG that shows every trigger")
    gallery.add_argument("--out", required=True, type=Path, metavar="OUT.png")
    gallery.add_argument("--data", metavar="PREPARED", help="prepared data set to take images from (default: made up)")
    gallery.set_defaults(main=_gallery)
    trojan = commands.add_parser("trojan-nn", help="optimise TrojanNN's trigger against a clean classifier")
    trojan.add_argument("--classifier", required=True, metavar="MODEL", help="model folder of a clean classifier")
    trojan.add_argument("--out", required=True, type=Path, metavar="OUT.png")
    trojan.add_argument("--layer", help="whose strongest inputs are excited (default: the last linear layer)")
    trojan.add_argument("--start", metavar="FILE", help="picture to start from, black where nothing is to be stamped")
    trojan.add_argument("--neurons", type=int, default=2)
    trojan.add_argument("--iterations", type=int, default=1000)
    trojan.set_defaults(main=_trojan_nn)


def _list(args: argparse.Namespace) -> int:
    sources = trigger_sources()
    if args.shown is not None:
        options = find_options(args.shown) or BUILT_IN[args.shown]
        lines = [f"{args.shown} ({sources[args.shown]})", *keys.paragraphs(keys.split_doc(options)[0], "  ")]
        print("\n".join([*lines, *keys.section_lines(options)]))
        return 0
    rows = [
        (name, source, keys.split_doc(BUILT_IN[name])[0].partition("\n")[0] if name in BUILT_IN else "")
        for name, source in sources.items()
    ]
    print("\n".join([*keys.table(rows), "", "dist-defend attacks NAME tells the keys of one."]))
    return 0


def _gallery(args: argparse.Namespace) -> int:
    from dist_defend.attacks import gallery
    from dist_defend.attacks.poison import image_size_of
    from dist_defend.data.store import open_dataset

    images = gallery.sample_images()
    if args.data:
        dataset = open_dataset(args.data)
        image_size_of(dataset)
        images = dataset.images(np.arange(min(3, len(dataset))))
    named = gallery.triggers(images.shape[1])
    _save(gallery.draw(images, named), args.out)
    print(f"{args.out}: {len(named)} triggers")
    return 0


def _trojan_nn(args: argparse.Namespace) -> int:
    from dist_defend.attacks.drawn import oval
    from dist_defend.attacks.pattern_file import read_pattern
    from dist_defend.attacks.stamping import to_bytes, to_images
    from dist_defend.attacks.trojan_nn import last_linear, optimise_pattern
    from dist_defend.models.artifact import load_classifier

    model, card = load_classifier(args.classifier)
    if card.backdoored:
        raise UserError(f"{args.classifier} is backdoored: TrojanNN starts from a clean classifier")
    if args.neurons < 1 or args.iterations < 1:
        raise UserError("--neurons and --iterations must be at least 1")
    size = card.image_size
    start = oval(size) if args.start is None else read_pattern(args.start, size, is_resized=True).astype(np.uint8)
    layer = args.layer or last_linear(model)
    pattern, cost = optimise_pattern(
        model, layer, to_images(start[None]), num_neurons=args.neurons, iterations=args.iterations
    )
    _save(Image.fromarray(to_bytes(pattern)[0]), args.out)
    print(f"{args.out}: trigger for the {args.neurons} strongest inputs of {layer}, cost {cost:.4g}")
    return 0


def _save(picture: Image.Image, path: Path) -> None:
    try:
        picture.save(path, format="PNG")
    except OSError as error:
        raise UserError(f"{path}: cannot write the picture ({error.strerror}); choose another --out") from error
