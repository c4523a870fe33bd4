"""One thread for every test process, so that ranks do not fight over two cores."""

import torch

torch.set_num_threads(1)
