"""`longrope extend`: every stage in order. Start reading at pipeline/extend.py."""
