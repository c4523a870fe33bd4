"""``python -m fedtan_hpc.runs``: all runs and how they fare."""

import sys

from .reporting.run_list import main

if __name__ == "__main__":
    sys.exit(main())
