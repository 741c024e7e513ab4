"""Attention kernels: forward, backward, sliding windows, soft-caps and sinks."""
