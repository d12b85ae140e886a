"""Measure a model: perplexity, lm-eval tasks, latency, footprint."""
