"""``python -m fedtan_hpc``."""

import sys

try:
    from .cli import main
except KeyboardInterrupt:  # Ctrl-C while hydra loads; ``main`` handles it later
    sys.exit(130)

main()
