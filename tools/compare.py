"""``python tools/compare.py``: the same as ``python -m fedtan_hpc.compare``."""

from fedtan_hpc.reporting.compare import main

if __name__ == "__main__":
    main()
