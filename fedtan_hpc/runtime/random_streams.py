"""Streams of random numbers that never meet: one for each purpose and what it is drawn for."""

from __future__ import annotations

import numpy as np

# A purpose keeps its number for good, since results depend on it: new ones go to the end.
IID, SHARDS, DIRICHLET, PARTICIPATION, CLASS_MEANS, SAMPLE, BATCHES = range(1, 8)
QUANTITY, REPLACEMENT, FLIPS, CROPS, TRAIN_SUBSET, TEST_SUBSET, TEST_CLIENTS = range(8, 15)
TRAIN_LOSS, LAYERS, JUDGED = range(15, 18)
TRAIN_LOSS, LAYERS, JUDGED = range(15, 18)


def generator(purpose: int, seed: int, first: int = 0, second: int = 0) -> np.random.Generator:
    """The stream of ``purpose`` for a seed and up to two numbers, such as client and round."""
    return np.random.default_rng([purpose, seed, first, second])
