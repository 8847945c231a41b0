"""dist-defend methods [NAME]: all methods with their source, or one with its keys."""

import argparse

from dist_defend.errors import UserError, did_you_mean


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fill the command's parser."""
    name = parser.add_argument("name", nargs="?", metavar="NAME", help="a method")
    name.completer = _names  # type: ignore[attr-defined]  # for argcomplete
    parser.set_defaults(main=main)


def _names(**_: object) -> list[str]:
    from dist_defend.methods import method_names

    return method_names()


def main(args: argparse.Namespace) -> int:
    """Print the list or the keys. UserError for an unknown method, or a plug-in that cannot be imported."""
    from dist_defend import keys
    from dist_defend.methods import headline, method_sources

    sources = method_sources()
    if args.name is None:
        lines = keys.table([(name, source, headline(name)) for name, source in sources.items()])
        print("\n".join([*lines, "", "dist-defend methods NAME tells the keys of one."]))
        return 0
    if args.name not in sources:
        hint = did_you_mean(args.name, [*sources])
        raise UserError(f"no method '{args.name}': {hint}choose from {', '.join(sources)}")
    print("\n".join(description(args.name, sources[args.name])))
    return 0


def description(name: str, source: str) -> list[str]:
    """Lines: what the method is and who published it, its keys and those of all sections, presets."""
    from dist_defend import keys
    from dist_defend.config import Experiment
    from dist_defend.methods import find_method

    module = find_method(name)
    lines = [*keys.wrapped(f"{name} ({source})", "", "  "), *keys.paragraphs(module.__doc__ or "", "  ")]
    lines += ["", f"section {name}", *keys.paragraphs(keys.split_doc(module.Config)[0], "  ")]
    lines += keys.section_lines(module.Config)
    presets = getattr(module, "PRESETS", {})
    if presets:
        lines += ["", f"presets ({name}.preset: NAME; own keys are put over it)"]
        for preset, options in presets.items():
            told = keys.in_yaml(options) if options else "the defaults"
            lines += keys.wrapped(f"{preset}: {told}", "  ", "      ")
    return [*lines, "", "keys beside the section, of every experiment", *keys.section_lines(Experiment)]
