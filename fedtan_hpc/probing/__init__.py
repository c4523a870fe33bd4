"""The gradient-deviation probe: what mismatched BN statistics do to the gradients of a round.

``probe`` runs a round's first batches with the statistics that ``mixed_statistics`` provides, and
compares the gradients (``deviation``).
Uses ``evaluation``, ``training``, ``models``, ``batchnorm``, ``data``, ``distributed``, ``runtime``
and ``config``; used by ``job``.
"""
