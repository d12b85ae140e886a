"""Tests of what a comparison records, keeps and ranks."""
