"""``python -m fedtan_hpc.runs``: list all runs and their states."""

import sys

from .reporting.run_list import main

if __name__ == "__main__":
    sys.exit(main())
