"""Output folders: allowed locations, locks, and atomic replacement."""
