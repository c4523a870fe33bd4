"""A run that was interrupted, for the tests of checkpoints and of their use."""

from pathlib import Path

import pytest

from fedtan_hpc.config.schema import CheckpointConfig
from tests.helpers.jobs import config_of, run_until


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A run with checkpoints after rounds 2, 4 and 5."""
    folder = tmp_path / "run"
    run_until(config_of("fedtan", folder, checkpoint=CheckpointConfig(every=2, keep=9)), 5)
    return folder
