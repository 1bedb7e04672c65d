"""Checks configs of training stacks for known muP mistakes."""

from scaletune.linting.lint import lint as lint
