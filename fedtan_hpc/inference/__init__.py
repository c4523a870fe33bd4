"""Finished runs: their network, and its evaluation on other data.

``saved_run`` loads options and network of a run, ``evaluate`` tests it.  Uses ``job``,
``evaluation``, ``tasks``, ``batchnorm``, ``data`` and ``runtime``.
"""
