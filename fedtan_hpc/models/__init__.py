"""Networks: built in, from torchvision or by import; and the groups of their tensors.

``norms`` replaces BN layers by other normalization layers; ``parameter_groups`` names the tensors
that algorithms treat differently.  Uses ``batchnorm`` and ``distributed``; used by
``evaluation``, ``probing``, ``tasks``, ``training``, ``job`` and ``inference``.
"""
