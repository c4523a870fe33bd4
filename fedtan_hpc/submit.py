"""``python -m fedtan_hpc.submit``: submit jobs."""

from .launch.submit import main

if __name__ == "__main__":
    main()
