"""Secrets stay out of records and logs: the last words of a library may hold the token it was given."""

from __future__ import annotations

import os
import re

_NAMES = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|(API|ACCESS|PRIVATE)?_?KEY)(_|$)", re.IGNORECASE)  # of variables
_USER = re.compile(r"(\w+://)[^/\s:@]+:[^/\s@]+@")  # scheme://user:password@
LEAST = 8  # letters of a value that is taken for a secret: a shorter one is a switch, and would blacken every text


def scrubbed(text: str) -> str:
    """`text` with the values of environment variables that are named as secrets, and passwords in addresses, put out."""
    secrets = {value for name, value in os.environ.items() if _NAMES.search(name) and len(value) >= LEAST and not os.path.exists(value)}
    for value in sorted(secrets, key=len, reverse=True):  # the longer first: one may hold another
        text = text.replace(value, "***")
    return _USER.sub(r"\1***@", text)
