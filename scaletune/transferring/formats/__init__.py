"""Emitters: one module per training stack, each with `emit(transfer, folder)`."""
