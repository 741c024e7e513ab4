"""Proof that an engine computes with the factors that an export was meant to give it."""
