"""Where trials run: local processes, a Ray cluster or Slurm jobs. `pool.py` selects the engine."""
