"""Strategies that score and decide, and the plan they write."""
