"""``python -m fedtan_hpc.compare``: compare methods."""

from .reporting.compare import main

if __name__ == "__main__":
    main()
