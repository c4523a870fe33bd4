"""Checks of options that depend on each other, by subject.  Used by ``validate``."""
