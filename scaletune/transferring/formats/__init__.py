"""Writers of training configs: one module per training stack."""
