"""Runs listed, compared and drawn, and partitions shown.

Reads the folders that runs have written; ``compare`` also runs what is missing.  Uses ``job`` and
the command line's parsing; used by the commands ``python -m fedtan_hpc.compare`` and its like.
"""
