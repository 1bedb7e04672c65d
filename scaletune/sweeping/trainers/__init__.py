"""Trains a trial with the user's own command or function.

A worker starts (`start`) the process of a trial in the trial's folder (`trial_files`) under a guard
(`guard`), which ends every process that the trial leaves. The supervisor (`supervisor`) reads what
the trial reports (`results_file`, `output_lines`, `own_log`, as `reports`), asks it to stop, and
decides how it has ended (`outcome`).
"""
