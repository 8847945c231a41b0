"""``python -m dist_defend`` is ``dist-defend``."""

import sys

from dist_defend.cli import main

sys.exit(main())
