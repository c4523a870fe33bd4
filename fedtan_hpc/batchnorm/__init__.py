"""The batch normalization layer whose statistics can be those of all clients.

``layer`` is the module, ``context`` makes its statistics global, ``statistics_call`` is one
exchange of statistics, ``global_kernels`` the arithmetic; ``reference`` restates it in plain
operations.  Uses ``distributed`` and ``runtime``; used by ``models`` and ``training``.
"""
