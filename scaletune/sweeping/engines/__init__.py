"""Where trials run: local processes, a Ray cluster, or Slurm jobs. One module or package per engine; `pool.py` selects it."""
