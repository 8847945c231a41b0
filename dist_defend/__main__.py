"""``python -m dist_defend`` is ``dist-defend``."""

import sys

from dist_defend import lifeline

if __name__ == "__main__":
    file = lifeline.follow()  # before the seconds that imports take

    from dist_defend.cli import main

    sys.exit(lifeline.answer(main(), file))
