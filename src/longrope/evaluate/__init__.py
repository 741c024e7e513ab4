"""Measure perplexity, retrieval and benchmarks."""
