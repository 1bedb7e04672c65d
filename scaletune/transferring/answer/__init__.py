"""The recommended settings at the target with their cost and sensitivity, as data and as text."""
