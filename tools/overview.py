"""``python tools/overview.py``: the same as ``python -m fedtan_hpc.overview``."""

from fedtan_hpc.reporting.overview import main

if __name__ == "__main__":
    main()
