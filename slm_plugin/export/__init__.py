"""Write a model and prove that what was written computes the same."""
