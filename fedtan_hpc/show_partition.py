"""``python -m fedtan_hpc.show_partition``: who holds which samples."""

from .reporting.show_partition import main

if __name__ == "__main__":
    main()
