"""The folder of a comparison: its runs, its tables and its curves.  Used by ``compare``."""
