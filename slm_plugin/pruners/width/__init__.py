"""Width strategies: which channels and heads to keep. One file a method."""
