"""Tests of the width strategies."""
