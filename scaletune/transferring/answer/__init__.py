"""The recommended settings at the target, with cost and sensitivity, as data and as text."""
