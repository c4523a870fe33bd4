"""A run from its options to its summary: set-up, round loop, checkpoints and results.

``run`` is the entry, ``trainer`` the round loop.  Uses all rooms below; used by the command line,
``inference``, ``launch`` and ``reporting``.
"""
