"""Tests of the depth strategies."""
