"""``python -m dist_defend`` is ``dist-defend``, and what a sweep starts for several points."""

import sys

from dist_defend import lifeline


def main() -> int:
    """The exit status."""
    file = lifeline.follow()  # before the seconds that imports take

    from dist_defend import cli
    from dist_defend.engine import signals
    from dist_defend.sweep import several

    signals.program()
    if sys.argv[1:2] == [several.WORD]:
        return several.main(sys.argv[2:], cli.main)
    return lifeline.answer(cli.main(), file)


if __name__ == "__main__":
    sys.exit(main())
