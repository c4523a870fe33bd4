"""``python -m fedtan_hpc.summarise_runs``: show the accuracy of runs in a table and a picture."""

from .reporting.summarise import main

if __name__ == "__main__":
    main()
