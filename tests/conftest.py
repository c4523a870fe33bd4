"""What every test process has: one thread, so that ranks do not fight over two cores, a short wait
for names, as torch looks up that of every address it connects to and a lost answer costs 5 s, and
no GPU unless one is asked for: the other tests say what CPUs do.
"""

import os

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("RES_OPTIONS", "timeout:1")


def pytest_configure(config: pytest.Config) -> None:
    """Tests on a GPU are asked for by their mark."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
