"""`python -m batchrun` is `batchrun`: no file of the folder where it is called becomes a module."""

import os
import sys

if not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(__file__)):
    del sys.path[0]  # the working folder, unless it is where this package lies

from batchrun.cli import main

if __name__ == "__main__":
    main()
