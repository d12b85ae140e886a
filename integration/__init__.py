"""Suites against the real ecosystem."""
