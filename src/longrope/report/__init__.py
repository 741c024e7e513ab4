"""Pictures of what a search found and what it is worth."""
