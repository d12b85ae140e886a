"""Folders that commands write: where they may lie, who writes them, and how they appear whole."""
