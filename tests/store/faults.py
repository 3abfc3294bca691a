"""Objects whose every step can be stopped: before it is made, or after, when its answer is lost."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from adapters.store.log.objects import Found, Objects


class KilledError(BaseException):
    """The process ends here: nothing that would run afterwards in it does anything to the place."""


class Faulty:
    """Around other objects. `before` and `after` are called with the operation and the key of every step; what they
    raise is raised. After a KilledError nothing reaches the place any more."""

    def __init__(self, inner: Objects) -> None:
        self.inner = inner
        self.steps: list[tuple[str, str]] = []
        self.before: Callable[[str, str], None] = lambda operation, key: None
        self.after: Callable[[str, str], None] = lambda operation, key: None
        self.is_dead = False

    def __str__(self) -> str:
        return str(self.inner)

    def create(self, key: str, data: bytes) -> bool:
        return bool(self._step("create", key, lambda: self.inner.create(key, data)))

    def get(self, key: str) -> bytes | None:
        found: bytes | None = self._step("get", key, lambda: self.inner.get(key))
        return found

    def list(self, prefix: str, after: str = "") -> Iterator[Found]:
        return iter(self._step("list", prefix, lambda: list(self.inner.list(prefix, after))))

    def put_file(self, key: str, file: Path) -> None:
        self._step("put_file", key, lambda: self.inner.put_file(key, file))

    def get_file(self, key: str, file: Path) -> None:
        self._step("get_file", key, lambda: self.inner.get_file(key, file))

    def remove(self, key: str) -> None:
        self._step("remove", key, lambda: self.inner.remove(key))

    def _step(self, operation: str, key: str, work: Callable[[], Any]) -> Any:
        if self.is_dead:
            raise KilledError
        self.steps.append((operation, key))
        try:
            self.before(operation, key)
            found = work()
            self.after(operation, key)
        except KilledError:
            self.is_dead = True
            raise
        return found
