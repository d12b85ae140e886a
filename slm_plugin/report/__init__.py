"""Show a run: JSON record, HTML page with pictures, model card."""
