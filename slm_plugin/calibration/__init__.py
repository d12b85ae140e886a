"""Calibration: text sources, token samples, captured activations."""
