"""``python -m dist_defend`` is ``dist-defend``, and what a sweep starts for several points."""

import sys

from dist_defend import lifeline

if __name__ == "__main__":
    file = lifeline.follow()  # before the seconds that imports take

    from dist_defend.cli import main
    from dist_defend.sweep import several

    if sys.argv[1:2] == [several.WORD]:
        sys.exit(several.main(sys.argv[2:], main))
    sys.exit(lifeline.answer(main(), file))
