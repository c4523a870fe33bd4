"""``python tools/jobs.py``: the same as ``python -m fedtan_hpc.runs``."""

import sys

from fedtan_hpc.reporting.run_list import main

if __name__ == "__main__":
    sys.exit(main(program="jobs"))
