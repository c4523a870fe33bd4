"""Independent streams of random numbers: one for each purpose, seed, client and round."""

import numpy as np

# Results depend on the numbers: a purpose keeps its number, and new ones go to the end.
IID, SHARDS, DIRICHLET, PARTICIPATION, CLASS_MEANS, SAMPLE, BATCHES = range(1, 8)
QUANTITY, REPLACEMENT, FLIPS, CROPS, TRAIN_SUBSET, TEST_SUBSET, TEST_CLIENTS = range(8, 15)
TRAIN_LOSS, LAYERS, EVALUATED_CLIENTS = range(15, 18)


def generator(purpose: int, seed: int, first: int = 0, second: int = 0) -> np.random.Generator:
    """Returns the stream of ``purpose`` for a seed and two numbers, such as client and round."""
    return np.random.default_rng([purpose, seed, first, second])
