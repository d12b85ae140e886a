"""What torch-pruning does with transformers models, so that we notice when it changes."""
