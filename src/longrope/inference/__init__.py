"""Generate text from an extended model."""
