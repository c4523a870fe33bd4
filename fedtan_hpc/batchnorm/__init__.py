"""The batch normalization layer whose statistics can be those of all clients.

The way of a batch: ``context`` binds the layers, ``layer`` is the module, ``global_kernels`` its
arithmetic, ``statistics_call`` the exchange of statistics; ``reference`` restates them in plain
operations.  Stacked clients go through ``vmap_autograd``, compiled steps through ``compile_ops``.
Uses ``distributed`` and ``runtime``; used by ``models``, ``training``,
``probing``, ``job`` and ``inference``.
"""
