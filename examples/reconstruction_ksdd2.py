"""Train feature reconstruction with CoMet on KolektorSDD2, or as a demo on packaged pictures."""

import sys

from comet_examples.cli import main

if __name__ == "__main__":
    sys.exit(main("reconstruction", "ksdd2"))
