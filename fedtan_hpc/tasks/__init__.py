"""What a network is trained for: the loss of a sample, and metrics that are sums over samples.

Uses ``models`` to read a network's outputs; used by ``training``, ``evaluation``,
``job`` and ``inference``.
"""
