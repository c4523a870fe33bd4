"""Communication between ranks; the only room that uses ``torch.distributed``.

The room holds the process group and how ranks find each other, collectives and their counters, the
watchdog that names a rank that hangs, the weighted average of models, and MPI as a backend
(``mpi``).  Uses ``config`` and ``runtime``; used by every room that exchanges tensors.
"""
