"""What the layers of a model make of a calibration set: how alike they are, what each changes."""
