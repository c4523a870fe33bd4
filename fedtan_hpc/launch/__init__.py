"""Jobs for SLURM: submission with submitit, and queueing a job again after it was stopped.

Uses ``run`` and the command line's parsing; used by ``python -m fedtan_hpc.submit``.
"""
