"""Perplexity and equivalence."""
