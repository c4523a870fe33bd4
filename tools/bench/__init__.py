"""Rounds, messages and clocks of the benchmarks in ``tools/``, shared with ``scaling``.

Only ``benchmark`` can be imported without torch; tools import the others after their options.
"""
