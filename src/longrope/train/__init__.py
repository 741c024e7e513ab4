"""Fine-tune a model at an extended length."""
