"""Fits loss laws, E + A / n_params**alpha + B / tokens**beta and its variants, to losses."""
