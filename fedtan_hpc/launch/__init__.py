"""Jobs for SLURM: their submission with submitit, their batch script, and when they run again.

Uses ``job`` and the command line's parsing; used by ``python -m fedtan_hpc.submit``.
"""
