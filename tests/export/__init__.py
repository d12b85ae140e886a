"""Tests of slm_plugin.export."""
