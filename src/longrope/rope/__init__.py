"""Rotary position embedding: the rescale, the known methods, and putting one into a model."""
