"""Tests of slm_plugin.pruners.layer_sparsity."""
