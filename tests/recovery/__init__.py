"""Tests of recoveries: repairing a pruned model without changing its shape."""
