"""Measured scaling of the job (``study_*``), and its prediction from a model of the network."""
