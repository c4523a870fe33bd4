"""Clients of a rank that train as one stack, by ``torch.func.vmap``.  Used by ``training``."""
