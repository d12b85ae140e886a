"""Recoveries that train by gradient descent."""
