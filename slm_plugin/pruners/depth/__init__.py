"""Depth strategies: which layers to merge or drop. One file a method."""
