"""Repairs in closed form: least squares and rescaling, without training."""
