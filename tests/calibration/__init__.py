"""Tests of calibration sources and captures."""
