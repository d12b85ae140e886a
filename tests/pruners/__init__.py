"""Tests of the strategies and the plan they write."""
