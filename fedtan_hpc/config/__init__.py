"""Everything that is decided without torch: options, their checks, and the table of algorithms.

Imports no other room, and neither torch nor numpy, so that a mistake in the options is reported
within a second.  Used by every other room.
"""
