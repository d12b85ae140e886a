"""Comparison of methods: records, costs, the cache of finished cells, table and Pareto plots."""
