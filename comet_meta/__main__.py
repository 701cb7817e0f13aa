"""``python -m comet_meta``: the command ``comet-meta``."""

import sys

from comet_meta.cli import main

if __name__ == "__main__":
    sys.exit(main())
