"""Read and write rescale factors in checkpoint formats."""
