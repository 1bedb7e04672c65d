"""Trains a trial with the user's own command or function.

A worker starts the process of a trial under a guard (`guard`), which ends every process that the
trial leaves. The supervisor (`supervisor`) reads what the trial reports (`reports`), asks it to
stop, and decides how it has ended (`outcome`).
"""
