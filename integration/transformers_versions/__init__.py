"""A checkpoint saved by one release of transformers, read by another."""
