"""Tests of how layers become one."""
