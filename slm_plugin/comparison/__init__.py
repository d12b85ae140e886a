"""Comparing methods: the record of every cell, its cost, what is kept of it, and the best ones."""
