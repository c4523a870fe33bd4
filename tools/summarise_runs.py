"""``python tools/summarise_runs.py``: the same as ``python -m fedtan_hpc.summarise_runs``."""

from fedtan_hpc.reporting.summarise import main

if __name__ == "__main__":
    main()
