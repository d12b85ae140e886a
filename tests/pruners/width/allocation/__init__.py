"""Tests of slm_plugin.pruners.width.allocation."""
