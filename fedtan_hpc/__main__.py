"""``python -m fedtan_hpc``."""

from .runtime.signals import interrupted_by_ctrl_c

with interrupted_by_ctrl_c():  # hydra loads here
    from .cli import main

main()
