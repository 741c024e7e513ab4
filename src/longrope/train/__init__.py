"""Fine-tuning at the searched length."""
