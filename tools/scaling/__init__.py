"""What the scaling study and the predictions in ``tools/`` share."""
