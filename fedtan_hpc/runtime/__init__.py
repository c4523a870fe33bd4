"""This process: its rank as the launcher tells it, its device, signals and memory.

Uses ``config``.  All rooms above use it; it does not communicate with other ranks.
"""
