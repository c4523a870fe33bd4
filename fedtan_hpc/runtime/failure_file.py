"""The file by which a rank tells the batch script that it has reported why it fails.

Another try of the job would fail too, so the script does not queue it again.  ``cli`` writes the
file; ``slurm/train.sbatch`` and the scripts of submitted jobs name it and look for it.
"""

import os
from contextlib import suppress
from pathlib import Path


def write() -> None:
    """Writes the empty file, if a batch script has asked for it."""
    if path := os.environ.get("FEDTAN_HPC_FAILURE_FILE"):
        with suppress(OSError):  # a full disk must not hide why the rank fails
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).touch()
