"""Model classes, one file per family; of format version 1, what needs neither S_n nor a sink uses vLLM's own."""
