"""Planted faults: mistakes that the tests must catch, and a command that tries each of them."""
