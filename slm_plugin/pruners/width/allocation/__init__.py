"""Allocations of width: how much of its MLP channels each layer loses.

An allocation returns one relative sparsity per layer, a number that matters only in proportion to
those of the other layers. `limits` turns the target into a number of channels, and `projection`
turns both into the channels that each layer keeps.
"""
