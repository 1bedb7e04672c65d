"""Which trial to train next: one module per search method; `space.py` holds the search space and `loop.py` drives the search."""
