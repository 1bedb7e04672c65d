"""Searches: which points to train next. `loop.py` runs the one that `search.kind` names."""
