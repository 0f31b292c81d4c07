"""Model classes with residual scaling (S_n), one file per family; everything else uses vLLM's own classes."""
