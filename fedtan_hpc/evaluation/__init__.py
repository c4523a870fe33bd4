"""Metrics of models, the records of a run, and who is told of them.

Evaluates the global model or the clients' own models on all ranks together; callbacks write
``rounds.jsonl`` and TensorBoard files and show progress.
Uses ``training``; used by ``probing``, ``job``, ``inference`` and ``reporting``.
"""
