"""Settings of every test process.

It has one thread, so that ranks do not compete for cores.  It waits 1 s for a name server: torch
looks up the name of every address, and a lost answer costs 5 s otherwise.  It sees no GPU unless
the command line selects the mark ``gpu``, because all other tests check results of CPUs.
"""

import os

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("RES_OPTIONS", "timeout:1")


def pytest_configure(config: pytest.Config) -> None:
    """Hides the GPUs, except with ``-m gpu``."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
