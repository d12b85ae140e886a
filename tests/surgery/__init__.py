"""Tests of the code that carries plans out."""
