"""Training of transforms and ranges: on weights alone, layer by layer, and against the original model."""
