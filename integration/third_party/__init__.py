"""A third-party plugin in an environment of its own."""
