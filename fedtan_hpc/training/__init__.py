"""One rank's part of a round: its clients' local steps and what they contribute to the average.

``client_runners`` run clients in lock-step, stacked or in turn; ``local_step`` is one client's
steps; ``cohort`` holds what outlives a round.  Uses ``models``, ``batchnorm`` and ``data``; used
by ``evaluation`` and ``run``.
"""
