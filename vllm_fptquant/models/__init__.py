"""Model classes, one file per family, called after its `model_type`, with what vLLM has to do unlike for Llama.

Of format version 1, what needs neither S_n nor a sink uses vLLM's own.
"""
