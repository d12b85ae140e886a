"""Tests of loading and viewing models."""
