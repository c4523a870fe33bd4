"""Networks: built in, from torchvision or by import; and what their tensors are.

Also replaces BN layers by other normalization layers (``norms``), and names the parameter groups
that algorithms treat differently.  Uses ``batchnorm`` and ``distributed``; used by ``training``,
``evaluation`` and ``run``.
"""
