"""Checkpoints of an extended model, for programs that know nothing of longrope."""
