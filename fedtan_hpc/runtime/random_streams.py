"""Independent streams of random numbers: one for each purpose, seed, client and round."""

import numpy as np

# Results depend on the numbers: a purpose keeps its number, and new ones go to the end.
IID, SHARDS, DIRICHLET, PARTICIPATION, CLASS_MEANS, SAMPLE, BATCHES = range(1, 8)
QUANTITY, REPLACEMENT, FLIPS, CROPS, TRAIN_SUBSET, TEST_SUBSET, TEST_CLIENTS = range(8, 15)
TRAIN_LOSS, LAYERS, EVALUATED_CLIENTS, ITEMS, TRANSFORMS = range(15, 20)


def generator(purpose: int, seed: int, first: int = 0, second: int = 0) -> np.random.Generator:
    """Returns the stream of ``purpose`` for a seed and two numbers, such as client and round."""
    return np.random.default_rng([purpose, seed, first, second])


def number(purpose: int, *key: int) -> int:
    """Returns a seed for other generators, 0 to 2^63 - 1, that follows from ``purpose`` and key."""
    words = np.random.SeedSequence([purpose, *key]).generate_state(1, np.uint64)
    return int(words[0]) >> 1
