"""Tests of searches and trials."""
