"""``python -m fedtan_hpc``."""

from .cli import main

main()
