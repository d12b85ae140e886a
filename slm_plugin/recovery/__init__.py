"""Repair a pruned model without changing its shape."""
