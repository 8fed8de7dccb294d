"""What of an error may leave a site, and what of a stranger's text may enter a log.

A site's own log has the whole error; what is sent to the server has gone through ``public`` or
``redact``: one short printable line without paths, addresses, keys and tokens. Of errors that are
not fedpeft's own nothing leaves but the type, and of those raised while the site's data were read
nothing but the setting that they are about, as they may quote a row, a label or a client.

A server redacts once more what it is told: a client that lies may send anything.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from fedpeft import errors
from fedpeft.errors import FedpeftError

LIMIT = 200
"""The most characters of a reason."""

SECRET, PATH = "[secret]", "[path]"

_READ = 4000
"""Characters that are looked at; the rest is dropped before."""

_OWN_ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
_IN_DATA = "fedpeft.data."
_SETTING = re.compile(r"[a-z][a-z_.]{0,60}(?=[=:])", re.ASCII)
_SENSITIVE = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL", re.I)
_NAMES = (
    r"(?:token|secret|passw(?:or)?d|passphrase|pwd|api[_-]?key|access[_-]?key|private[_-]?key"
    r"|authorization|credentials?|signature)"
)
_RULES = [
    (re.compile(rule), by)
    for rule, by in [
        (r"(?s)-----BEGIN .*?(?:-----END [^-]{0,80}-----|$)", SECRET),
        (r"(?i)\b([a-z][a-z0-9+.-]{0,20}://)[^\s'\"<>]+", r"\1[address]"),
        (rf"(?i)(\b(?:[\w.-]{{0,40}}[._-])?{_NAMES}['\"]?\s{{0,3}}[=:]\s{{0,3}})"
         r"(?:(?:bearer|basic)\s+)?(?:\"[^\"]*(?:\"|$)|'[^']*(?:'|$)|[^\s,;&]+)", rf"\1{SECRET}"),
        (r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}", rf"\1 {SECRET}"),
        (r"(?<![A-Za-z0-9])(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA|ASIA)[\w-]{4,}",
         SECRET),
        (r"(['\"])(?:~[\w.-]{0,40}[\\/]|\.{0,2}/|[A-Za-z]:[\\/]|\\\\)(?:(?!\1).)+(?:\1|$)",
         rf"\1{PATH}\1"),
        (r"(?<![\w.\]/])(?!//\[address\])(?:~[\w.-]{0,40}/|\.{0,2}/|[A-Za-z]:[\\/]|\\\\)[^\s'\"]+"
         r"(?: [^\s'\"]*[/\\][^\s'\"]*)*", PATH),
        (r"(?<![0-9A-Za-z])[0-9a-fA-F]{32,}(?![0-9A-Za-z])", SECRET),
        (r"(?<![\w+/=-])[\w+/-]{40,}={0,2}", SECRET),
    ]
]  # fmt: skip


def redact(text: str, limit: int = LIMIT) -> str:
    """The text on one printable line of at most ``limit`` characters, without what is private.

    Taken out are: paths from the root, from a home or through ``..``; all of an address behind
    ``scheme://``; private keys (PEM); what follows ``token=``, ``password:`` and the like;
    tokens of well-known forms; runs of 32 hexadecimal or 40 base64 digits; and, word for word, the
    values of this process's environment variables that are called tokens, secrets or keys. A name
    of 40 characters without a dot or a blank is taken for a key.

    >>> redact("data.source='/clinic/ward 3/x.csv' does not exist")
    "data.source='[path]' does not exist"
    >>> redact("401 for https://ann:pw@hub.example/api?token=abc with HF_TOKEN=hf_abcdefgh")
    '401 for https://[address] with HF_TOKEN=[secret]'
    """
    found = text[:_READ]
    if len(text) > _READ:
        found = found.rpartition(" ")[0]  # half a secret would not be known for one
    for value in _own_secrets():
        found = found.replace(value, SECRET)
    pem, rules = _RULES[0], _RULES[1:]
    found = pem[0].sub(pem[1], found)
    found = " ".join("".join(c if c.isprintable() else " " for c in found).split())
    for rule, by in rules:
        found = rule.sub(by, found)
    return found if len(found) <= limit else f"{found[: limit - 3]}..."


def public(error: BaseException) -> str:
    """Of an error, ``Type: message``, what may leave a site; see the module."""
    kind = type(error).__name__
    if not isinstance(error, FedpeftError):
        return public_reason(f"{kind}: {error}")
    if _from_data(error):
        about = _SETTING.match(str(error))
        what = about[0] if about else "the data"
        return f"{kind}: {what} does not fit this site's data (the text is in the node's log)"
    return redact(f"{kind}: {error}")


def public_reason(text: str) -> str:
    """Of ``Type: message``, what may leave a site: the message only of fedpeft's own errors."""
    kind = text.partition(": ")[0]
    return redact(text if kind in _OWN_ERRORS else f"{kind} (the traceback is in the node's log)")


def _from_data(error: BaseException) -> bool:
    """Whether an error, or one that it was made of, was raised by the code that reads data."""
    seen: BaseException | None = error
    while seen is not None:
        if any(name.startswith(_IN_DATA) for name in _modules(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _modules(error: BaseException) -> Iterator[str]:
    """The modules on an error's way up."""
    at = error.__traceback__
    while at is not None:
        yield str(at.tb_frame.f_globals.get("__name__", ""))
        at = at.tb_next


def _own_secrets() -> list[str]:
    """Values of environment variables that are secrets by their name, the longest first."""
    values = {value for name, value in os.environ.items() if _SENSITIVE.search(name)}
    return sorted((value for value in values if len(value) >= 6), key=len, reverse=True)
