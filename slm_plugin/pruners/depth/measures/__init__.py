"""What is measured of layers and models: likeness, influence, sensitivity."""
