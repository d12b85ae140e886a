"""Load a model and see every supported architecture through one view."""
