"""``python -m fedtan_hpc.submit``: submit a job or a sweep to SLURM."""

from .launch.submit import main

if __name__ == "__main__":
    main()
