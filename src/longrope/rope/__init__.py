"""Rescaled rotary position embeddings, and how they are put into a model."""
