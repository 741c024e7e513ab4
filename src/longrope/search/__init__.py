"""The search for rescale factors: candidates, an algorithm, the loss, and the loop around them."""
