"""Owns authentication: the server's keys, and the caller that a request's key identifies.

Invariant: a key is hashed as soon as it arrives, compared with every known key in constant time, and never part of a
message.
"""

import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Literal, TypeVar

ADMIN_LABEL = "admin"
MIN_KEY_LENGTH = 8
Need = Literal["none", "inference", "admin", "metrics"]
"""The key that a route needs."""
_LABEL = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[!-~]*")
_Text = TypeVar("_Text", str, bytes)


@dataclass(frozen=True)
class Caller:
    """The caller of a request. label: the key's label (None: no key was needed). is_admin: may change adapters.

    client (an IP address) and request_id: for the audit log; they do not count when callers are compared.
    """

    label: str | None
    is_admin: bool
    client: str | None = field(default=None, compare=False)
    request_id: str | None = field(default=None, compare=False)


ANONYMOUS = Caller(None, False)


class KeyProblems(ValueError):  # noqa: N818 (carries several)
    """The keys given cannot be used together; `problems` says why, and contains no key."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def labelled_key(item: str) -> tuple[str, str]:
    """LABEL=KEY as a pair. Raises ValueError, which repeats nothing of the item: any of it may be secret."""
    label, equals, key = item.partition("=")
    if not equals:
        raise ValueError("found no '=', expected LABEL=KEY")
    if not _LABEL.fullmatch(label):
        raise ValueError("found a label that is not 1 to 64 of the characters A-Z a-z 0-9 . _ -, expected LABEL=KEY")
    if label == ADMIN_LABEL:
        raise ValueError(f"found the label {ADMIN_LABEL!r}, which is the admin key's; choose another")
    if problem := key_problem(key):
        raise ValueError(problem)
    return label, key


def labelled_keys(items: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs of (source, LABEL=KEY) items. Raises KeyProblems with every problem and its source."""
    pairs: list[tuple[str, str]] = []
    problems: list[str] = []
    for where, item in items:
        try:
            pairs.append(labelled_key(item))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise KeyProblems(problems)
    return pairs


def key_problem(key: str) -> str | None:
    """Why a key cannot be used; None if it can."""
    if not _KEY.fullmatch(key):
        return "found a key with a space or a character outside ASCII, expected printable ASCII"
    if len(key) < MIN_KEY_LENGTH:
        return f"found a key of {len(key)} characters, expected at least {MIN_KEY_LENGTH}: `openssl rand -hex 24`"
    return None


class KeyRing:
    """The server's keys, hashed. Raises KeyProblems for a duplicate label or key."""

    def __init__(
        self,
        api_keys: Iterable[tuple[str, str]] = (),
        admin_key: str | None = None,
        metrics_key: str | None = None,
    ) -> None:
        pairs = list(api_keys)
        self._callers = [(_digest(key), Caller(label, False)) for label, key in pairs]
        if admin_key is not None:
            self._callers.append((_digest(admin_key), Caller(ADMIN_LABEL, True)))
        self._metrics = None if metrics_key is None else _digest(metrics_key)
        self.needs_key = bool(pairs)
        self.has_admin = admin_key is not None
        self.has_metrics_key = metrics_key is not None
        if problems := self._problems([label for label, _ in pairs]):
            raise KeyProblems(problems)

    @property
    def labels(self) -> frozenset[str]:
        """The labels of the API keys, which `allowed_keys` may name."""
        return frozenset(caller.label for _, caller in self._callers if caller.label and not caller.is_admin)

    def identify(self, authorization: str | None, x_api_key: str | None = None) -> Caller | None:
        """The caller whose key `Authorization: Bearer KEY` or `x-api-key: KEY` carries; None without a known key."""
        given = presented_key(authorization, x_api_key)
        digest = _digest(given or "")
        found = None
        for known, caller in self._callers:
            found = caller if hmac.compare_digest(known, digest) else found
        return found if given else None

    def has(self, text: str) -> bool:
        """Whether a text is one of the keys, the metrics key included."""
        authorization = f"Bearer {text}"
        return self.identify(authorization) is not None or self.may_read_metrics(authorization)

    def may_read_metrics(self, authorization: str | None, x_api_key: str | None = None) -> bool:
        """Whether the headers carry the metrics key or the admin key."""
        caller = self.identify(authorization, x_api_key)
        return self.is_metrics_key(authorization, x_api_key) or (caller is not None and caller.is_admin)

    def is_metrics_key(self, authorization: str | None, x_api_key: str | None = None) -> bool:
        """Whether the headers carry the metrics key."""
        given = presented_key(authorization, x_api_key)
        return bool(given) and hmac.compare_digest(self._metrics or b"", _digest(given or ""))

    def _problems(self, labels: list[str]) -> list[str]:
        names = [caller.label or "" for _, caller in self._callers]
        digests = [digest for digest, _ in self._callers]
        if self._metrics is not None:
            names, digests = [*names, "metrics"], [*digests, self._metrics]
        problems = [f"found the label {name!r} twice, expected a label each" for name in _repeated(labels)]
        for digest in _repeated(digests):
            shared = [name for name, other in zip(names, digests, strict=True) if other == digest]
            problems.append(f"found the same key for {', '.join(shared)}, expected a key each")
        return problems


def presented_key(authorization: str | None, x_api_key: str | None) -> str | None:
    """The key that a request carries; `Authorization` takes precedence over Anthropic's `x-api-key`."""
    if authorization is None:
        return x_api_key or None
    scheme, _, key = authorization.strip().partition(" ")
    return (key.strip() or None) if scheme.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()


def _repeated(values: list[_Text]) -> list[_Text]:
    return sorted({value for value in values if values.count(value) > 1})
