"""Tests of the analysis of layers."""
