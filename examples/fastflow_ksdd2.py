"""Train FastFlow with CoMet on KolektorSDD2, or as a demo on pictures that a package ships."""

import sys

from comet_examples.cli import main

if __name__ == "__main__":
    sys.exit(main("fastflow", "ksdd2"))
