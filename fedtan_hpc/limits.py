"""Two sizes that both the checks (without numpy) and the data need."""

MINIMUM_SAMPLES = 2
"""Training samples of a client; local batch normalization needs two values per channel."""

TEST_SHARE = 0.2
"""Share of the samples that is kept for the test set."""
