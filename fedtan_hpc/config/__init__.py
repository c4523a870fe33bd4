"""Everything that is decided without torch: options, their checks, and the table of algorithms.

Uses nothing else of the package, and neither torch nor numpy, so that a mistake in the options is
reported within a second.  All other rooms use it.
"""
