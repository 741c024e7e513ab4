"""Search the rescale factors for a target length."""
