"""``python tools/show_partition.py``: the same as ``python -m fedtan_hpc.show_partition``."""

from fedtan_hpc.reporting.show_partition import main

if __name__ == "__main__":
    main()
