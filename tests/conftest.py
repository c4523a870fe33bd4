"""What every test process has: one thread, so that ranks do not fight over two cores, and a short
wait for names, as torch looks up that of every address it connects to and a lost answer costs 5 s.
"""

import os

import torch

torch.set_num_threads(1)
os.environ.setdefault("RES_OPTIONS", "timeout:1")
