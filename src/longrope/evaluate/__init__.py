"""What a rescale is worth: perplexity, and methods side by side."""
