"""``python -m fedtan_hpc.show_partition``: show which client has which samples."""

from .reporting.show_partition import main

if __name__ == "__main__":
    main()
