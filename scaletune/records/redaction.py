"""Secrets stay out of records and logs: the last words of a library may hold the token it was given."""

from __future__ import annotations

import os
import re

_NAMES = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|(API|ACCESS|PRIVATE)?_?KEY)(_|$)",
    re.IGNORECASE,
)  # of variables
LEAST = 8  # letters of a value that is taken for a secret: a shorter one is a switch, and would blacken every text
_VALUE = r"(?!\d+\b)[\w\-./+=~]{8,}"
_FORMS = (  # how secrets look that no variable of ours holds; group 1 stays
    re.compile(r"([\w+.-]+://)[^/\s\"']*@"),  # scheme://user:password@, scheme://token@
    re.compile(  # HF_TOKEN=..., ?token=..., "api_key": "...", --password ...
        rf"((?<![A-Za-z])(?:\w*_)?(?:token|secret|password|passwd|credentials?|(?:api|access|private|secret|auth)[_-]?key)"
        rf"[\"']?(?:\s*[=:]\s*|(?<=-password)\s+|(?<=-token)\s+)(?:bearer\s+)?[\"']?){_VALUE}",
        re.IGNORECASE,
    ),
    re.compile(
        rf"((?:authorization[\"']?\s*[:=]\s*[\"']?(?:basic|bearer|token)|\bbearer)\s+){_VALUE}",
        re.IGNORECASE,
    ),
    re.compile(
        r"()\b(?:hf_|gh[opsu]_|github_pat_|glpat-|sk-|xox[abp]-|AKIA|AIza)[\w-]{16,}"
    ),  # as their issuers begin them
)


def scrubbed(text: str) -> str:
    """`text` without the values of environment variables that are named as secrets, and without what has the form of one."""
    secrets = {
        value
        for name, value in os.environ.items()
        if _NAMES.search(name) and len(value) >= LEAST and not os.path.exists(value)
    }
    for value in sorted(secrets, key=len, reverse=True):  # the longer first: one may hold another
        text = text.replace(value, "***")
    for form in _FORMS:
        text = form.sub(lambda found: f"{found[1]}***{'@' if found[0].endswith('@') else ''}", text)
    return text
