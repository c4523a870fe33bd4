"""Data sets, their partition among the clients, and the batches of each client.

Uses ``config`` and ``runtime``; used by ``training``, ``evaluation``, ``probing``, ``job``,
``inference`` and ``reporting``.
"""
