"""Data sets for trying the job on several tasks, and patterns for functions of your own.

Each function is a value of ``data.target`` with ``data=import``, and makes natural clients, for
``partition=natural``.
"""
