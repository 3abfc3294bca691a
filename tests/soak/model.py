"""What may be true of one name, by what its one client was told: a set of states, of which an answer leaves one.

A change without an answer leaves the state before it, the one after, and those it passes through on purpose. Invariant:
`agree` accepts only what the changes that were asked for can have made; a number stands for one content for ever.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

NEW = 0
"""Stands for the number of a version that nobody was told yet."""


class WrongError(AssertionError):
    """The server says what cannot be."""


@dataclass(frozen=True)
class Change:
    """What a change may leave behind if it is cut off, and what it leaves once it is answered."""

    on_the_way: "list[State]"
    after: "list[State]"


@dataclass(frozen=True)
class State:
    """ready: number -> digest. ending: numbers whose delete was asked for; they go by themselves."""

    ready: Mapping[int, str] = field(default_factory=dict)
    ending: frozenset[int] = frozenset()
    active: int | None = None
    allowed_keys: tuple[str, ...] | None = None
    pinned: bool = False

    def uploaded(self, digest: str, activate: bool) -> Change:
        """A version that is not active yet is on the way of an upload that activates."""
        existing = next((number for number, known in self.ready.items() if known == digest), None)
        number = NEW if existing is None else existing
        is_going = bool(self.ending) and not self.ready  # then the new version inherits the restriction alone
        start = replace(self, pinned=False) if is_going else self
        added = replace(start, ready={**start.ready, number: digest})
        return Change([self, added], [replace(added, active=number)]) if activate else Change([self], [added])

    def deleted(self, number: int | None) -> Change:
        """A version, or all of them (None)."""
        numbers = set(self.ready) if number is None else {number}
        ready = {n: digest for n, digest in self.ready.items() if n not in numbers}
        active = None if self.active in numbers else self.active
        return Change([self], [replace(self, ready=ready, ending=self.ending | numbers, active=active)])

    def patched(self, **values: Any) -> Change:
        return Change([self], [replace(self, **values)])


@dataclass
class NameModel:
    """One name. possible: each state that may be true. digests: every number ever seen. gone: those seen to be gone."""

    name: str
    possible: list[State] = field(default_factory=lambda: [State()])
    digests: dict[int, str] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    history: list[str] = field(default_factory=list)

    @property
    def state(self) -> State:
        """The one that is true, where nothing is in doubt."""
        (state,) = self.possible
        return state

    def agree(self, seen: Mapping[str, Any] | None, possible: Iterable[State] | None = None) -> int:
        """Take what the server says (an adapter object; None: 404) as the truth; which of the possible states it was.

        Raises WrongError if it can be none of them.
        """
        states = self.possible if possible is None else list(possible)
        versions = [] if seen is None else seen["versions"]
        self._check_numbers(versions)
        for place, state in enumerate(states):
            found = self._matched(state, seen)
            if found is not None:
                self._note(versions, found)
                self.possible = [found]
                return place
        raise WrongError(f"found {_short(seen)}, expected one of {[_shown(state) for state in states]}")

    def _matched(self, state: State, seen: Mapping[str, Any] | None) -> State | None:
        """`state` with every number known, if that is what is seen."""
        if seen is None:
            return None if state.ready else State(allowed_keys=state.allowed_keys)
        ready = {v["version"]: v["digest"] for v in seen["versions"] if v["state"] == "ready"}
        ending = {v["version"] for v in seen["versions"] if v["state"] == "draining"}
        wanted, active = dict(state.ready), state.active
        fresh = [number for number in ready if number not in self.digests]
        if NEW in wanted and len(fresh) == 1:
            wanted[fresh[0]] = wanted.pop(NEW)
            active = fresh[0] if active == NEW else active
        if ready != wanted or not ending <= state.ending or seen["active"] != active:
            return None
        if len(ready) + len(ending) != len(seen["versions"]):  # failed: no version may be
            return None
        allowed = None if seen["allowed_keys"] is None else tuple(seen["allowed_keys"])
        if ready and (allowed, seen["pinned"]) != (state.allowed_keys, state.pinned):
            return None
        return State(ready, frozenset(ending), active, allowed, seen["pinned"])

    def _check_numbers(self, versions: Iterable[Mapping[str, Any]]) -> None:
        """Raises WrongError for a number that was used before."""
        highest = max(self.digests, default=0)
        for version in versions:
            number, digest = version["version"], version["digest"]
            if number in self.gone:
                raise WrongError(f"version {number} is listed again after it was gone")
            if number not in self.digests and number <= highest:
                raise WrongError(f"a new version has number {number}, {highest} was given before")
            if self.digests.get(number, digest) != digest:
                raise WrongError(f"version {number} had digest {self.digests[number]}, now {digest}")

    def _note(self, versions: Iterable[Mapping[str, Any]], now: State) -> None:
        self.digests.update({version["version"]: version["digest"] for version in versions})
        self.gone |= self.digests.keys() - now.ready.keys() - now.ending

    def __str__(self) -> str:
        return f"{self.name}: " + "; ".join(self.history[-40:])


def _shown(state: State) -> str:
    ready = ", ".join(f"{number}={digest[:6]}" for number, digest in state.ready.items())
    ending = f" ending {sorted(state.ending)}" if state.ending else ""
    return f"[{ready}] active {state.active}{ending} {state.allowed_keys} {state.pinned}"


def _short(seen: Mapping[str, Any] | None) -> str:
    if seen is None:
        return "404"
    versions = ", ".join(f"{v['version']}={v['digest'][:6]} {v['state']}" for v in seen["versions"])
    return f"[{versions}] active {seen['active']} {seen['allowed_keys']} {seen['pinned']}"
