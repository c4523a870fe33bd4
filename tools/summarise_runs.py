"""``python tools/summarise_runs.py``: accuracy of finished runs, as a table and a picture."""

from fedtan_hpc.reporting.summarise import main

if __name__ == "__main__":
    main()
