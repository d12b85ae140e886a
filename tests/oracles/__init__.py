"""Slow, straight transcriptions of published loops, to compare the package with."""
