"""``python slurm/submit.py``: the same as ``python -m fedtan_hpc.submit``."""

from fedtan_hpc.launch.submit import main

if __name__ == "__main__":
    main()
