"""Run a model layer by layer over a sequence of any length, forward and backward."""
