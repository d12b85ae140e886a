"""Tests of the restoration of linear maps by least squares."""
