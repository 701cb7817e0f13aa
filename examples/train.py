"""Train any detector with CoMet on any data set: --detector fastflow --dataset viaduct.

The scripts that are named after both, such as fastflow_viaduct.py, are this one with these values.
"""

import sys

from comet_examples.cli import main

if __name__ == "__main__":
    sys.exit(main())
