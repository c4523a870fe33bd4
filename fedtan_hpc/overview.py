"""``python -m fedtan_hpc.overview``: show several comparisons side by side."""

from .reporting.overview import main

if __name__ == "__main__":
    main()
