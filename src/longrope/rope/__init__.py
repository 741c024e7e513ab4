"""Rescaled rotary position embeddings, and their application to models."""
