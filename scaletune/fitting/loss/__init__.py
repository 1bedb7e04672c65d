"""Loss laws: E + A / n_params**alpha + B / tokens**beta and their variants, fitted to losses."""
