"""Finished runs: their network, its evaluation on other data, and probes of it.

``saved_run`` loads options and network of a run, ``evaluate`` tests it, and ``probe`` measures what
mismatched statistics do to its gradients.  Uses ``job``, ``evaluation``, ``tasks``, ``models``,
``batchnorm``, ``data``, ``distributed`` and ``runtime``.
"""
