"""dist-defend models [NAME]: all architectures and normalizations with their source, or one."""

import argparse

from dist_defend.errors import UserError, did_you_mean


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fill the command's parser."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="an architecture or a normalization")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Print the list, or one. UserError for an unknown name, or a plug-in that cannot be imported."""
    from dist_defend import keys, plugins
    from dist_defend.models.architectures import architecture_sources
    from dist_defend.models.pixel_space import NORMALIZATIONS

    architectures, normalizations = architecture_sources(), plugins.sources("normalizations", NORMALIZATIONS)
    if args.name is not None:
        plugins.allow(args.name)
        known = [*architectures, *normalizations]
        if args.name not in known and ":" not in args.name:
            hint = did_you_mean(args.name, known)
            raise UserError(f"no architecture or normalization '{args.name}': {hint}choose from {', '.join(known)}")
        print("\n".join(description(args.name, {**normalizations, **architectures}.get(args.name, ""))))
        return 0
    lines = ["Architectures (key arch; also timm:NAME, torchvision:NAME, open_clip:NAME, and your own module:name)"]
    lines += keys.table([(name, source, _what(name)) for name, source in architectures.items()])
    lines += [
        "",
        "Normalizations (key normalization; also numbers, mean,std or three of each, and your own module:name)",
    ]
    lines += keys.table([(name, source, _numbers(name)) for name, source in normalizations.items()])
    print("\n".join(lines))
    return 0


def _what(name: str) -> str:
    """What a built-in name is, without an import of a plug-in."""
    from dist_defend.models.architectures import CLASSIFIERS, ENCODERS

    found = CLASSIFIERS.get(name) or ENCODERS.get(name)
    if found is None:
        return "encoder, the image tower of CLIP" if name == "clip_resnet50" else ""
    return f"{'classifier' if name in CLASSIFIERS else 'encoder'}, of {found.source}"


def _numbers(name: str) -> str:
    from dist_defend.models.pixel_space import NORMALIZATIONS

    if name not in NORMALIZATIONS:
        return ""
    return "mean {} std {}".format(*(" ".join(f"{number:g}" for number in row) for row in NORMALIZATIONS[name]))


def description(name: str, source: str) -> list[str]:
    """Lines on an architecture (kind, image size, features, parameters' names, whose they are) or on constants."""
    from dist_defend import keys
    from dist_defend.models.architectures import ENCODERS, ClassifierArchitecture, added, find_classifier
    from dist_defend.models.pixel_space import normalization_constants, normalization_names

    told = [("source", source or "your own module")]
    if name in normalization_names():
        rows = zip(("mean", "std"), normalization_constants(name), strict=True)
        told += [(word, " ".join(f"{number:g}" for number in row)) for word, row in rows]
        return [name, *keys.table([("  " + word, value) for word, value in told])]
    found = added(name) or find_classifier(name) or ENCODERS.get(name)
    if found is None:
        raise UserError(f"'{name}' is an architecture of a library, or CLIP's: see its own documentation")
    told += [("kind", "classifier" if isinstance(found, ClassifierArchitecture) else "encoder")]
    told += [("image size", f"{found.image_size} px"), ("keys", found.keys), ("published", found.source)]
    if not isinstance(found, ClassifierArchitecture):
        told += [("features", str(found.feature_dim))]
    return [name, *keys.table([("  " + word, value) for word, value in told])]
