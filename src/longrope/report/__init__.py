"""Plots and pages of a run."""
