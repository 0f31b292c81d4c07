"""The model class of all families.

Of format version 1, what needs neither S_n nor a sink uses vLLM's own.
"""
