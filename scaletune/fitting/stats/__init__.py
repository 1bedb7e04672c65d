"""Robust costs and resampling."""
