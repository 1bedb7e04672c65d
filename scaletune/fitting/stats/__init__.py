"""Robust regression and resampling."""
