"""How runs of layers are looked for: the walks, the trials that they make, and their journal."""
