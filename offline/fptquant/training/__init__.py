"""Training: the local objective on weights, the end-to-end objective against the original model, resumable state."""
