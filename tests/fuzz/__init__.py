"""Seeded, damaged or wild inputs by the hundred: each ends in one line, or in the right result."""
