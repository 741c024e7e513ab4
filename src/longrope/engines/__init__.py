"""Check which factors an inference engine applies."""
