"""The user's own data: samples, their targets, and the data set that they make."""
