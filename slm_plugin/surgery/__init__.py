"""Carry plans out: the only code that changes a model's shape."""
