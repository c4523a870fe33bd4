"""One rank's part of a round: its clients' local steps and what they add to the average.

``client_runners`` run clients in lock-step, stacked or one after another; ``local_step`` has the
steps of one client; ``cohort`` keeps what outlives a round.  Uses ``tasks``, ``models``,
``batchnorm``, ``data`` and ``distributed``; used by ``evaluation``, ``probing`` and
``job``.
"""
