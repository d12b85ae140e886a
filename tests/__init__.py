"""Tests of slm_plugin; the folders mirror the package."""
