"""Files: atomic writes, checked reads, stores that survive a kill, locks."""
