"""Redacts credentials from text, such as error messages, before it is stored or logged."""

from __future__ import annotations

import os
import re

_SECRET_NAMES = re.compile(  # of environment variables
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|(API|ACCESS|PRIVATE)?_?KEY)(_|$)",
    re.IGNORECASE,
)
MIN_LENGTH = 8  # a shorter value is a switch: to redact it would change every text
_VALUE = r"(?!\d+\b)[\w\-./+=~]{8,}"
_FORMS = (  # forms of secrets that no environment variable holds; group 1 stays
    re.compile(r"([\w+.-]+://)[^/\s\"']*@"),  # scheme://user:password@, scheme://token@
    re.compile(  # HF_TOKEN=..., ?token=..., "api_key": "...", --password ...
        r"((?<![A-Za-z])(?:\w*_)?"
        r"(?:token|secret|password|passwd|credentials?|(?:api|access|private|secret|auth)[_-]?key)"
        r"[\"']?(?:\s*[=:]\s*|(?<=-password)\s+|(?<=-token)\s+)(?:bearer\s+)?[\"']?)" + _VALUE,
        re.IGNORECASE,
    ),
    re.compile(
        r"((?:authorization[\"']?\s*[:=]\s*[\"']?(?:basic|bearer|token)|\bbearer)\s+)" + _VALUE,
        re.IGNORECASE,
    ),
    re.compile(  # prefixes that issuers give to tokens
        r"()\b(?:hf_|gh[opsu]_|github_pat_|glpat-|sk-|xox[abp]-|AKIA|AIza)[\w-]{16,}"
    ),
)


def redact(text: str) -> str:
    """`text` without the values of secret environment variables and without known token forms."""
    secrets = {
        value
        for name, value in os.environ.items()
        if _SECRET_NAMES.search(name) and len(value) >= MIN_LENGTH and not os.path.exists(value)
    }
    # the longer first: one secret may contain another
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, "***")
    for form in _FORMS:
        text = form.sub(lambda match: f"{match[1]}***{'@' if match[0].endswith('@') else ''}", text)
    return text
