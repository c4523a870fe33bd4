"""``python -m fedtan_hpc``."""

import sys

from .runtime.signals import INTERRUPTED, Interrupted, interrupted_by_ctrl_c, say_interrupted

try:
    with interrupted_by_ctrl_c():  # hydra loads here
        from .cli import main
except Interrupted:
    say_interrupted("fedtan_hpc")
    sys.exit(INTERRUPTED)

main()
