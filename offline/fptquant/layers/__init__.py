"""Work that goes layer by layer: which layers are in memory, and what enters them."""
