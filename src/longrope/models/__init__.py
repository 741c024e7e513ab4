"""Inspect a model, check that it can be extended, and load it."""
