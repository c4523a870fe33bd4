"""From the words of a command line to configurations: hydra's flags, its own options, sweeps.

Hydra composes a configuration and shows what flags ask for; it never runs anything, so that no
launcher, sweeper or folder of its own comes into play.  Uses ``config`` and ``runtime``.  All
commands compose through ``cli``.
"""
