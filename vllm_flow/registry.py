"""What goes by a name: what this package brings, and what installed packages add by entry points.

Names are known from the packages' metadata; a package is imported when one of its names is used, in each process
by itself. One that cannot be imported, or brings something else, is in nobody's way until then. Knows neither
ranks nor tasks. (standard library only)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Generic, TypeVar

T = TypeVar("T")

OURS = "vllm-flow"
"""This distribution."""


class PluginError(ValueError):
    """What an installed package registers cannot be used; the message names package, module and fault."""


@dataclass(frozen=True)
class Added:
    """A name that an installed package registers."""

    name: str
    distribution: str
    """Its name and version."""
    place: str
    """Module and attribute, as ``module:attribute``."""
    point: metadata.EntryPoint

    def __str__(self) -> str:
        return f"{self.distribution} ({self.place})"


class Registry(Mapping[str, T], Generic[T]):
    """Names and what they stand for: a mapping over all that is known, this package's own first.

    Asking which names there are imports nothing of other packages. A name that a package adds in vain, since
    this package or another one has it as well, stays refused by :meth:`check`.

    Args:
        group: the entry points' group.
        kind: what one of them is called in messages.
        own: what this package brings; asked at every use, so it is to remember its answer.
        admit: checks what a package brings, and returns what is to be used in its place. Raises
            ValueError, in words that say what is wrong with it.
        reserved: names that mean something else where one of these could be written.
        names: the pattern that all of a name must match.
    """

    def __init__(
        self,
        group: str,
        kind: str,
        own: Callable[[], Mapping[str, T]],
        admit: Callable[[Added, object], T],
        reserved: Callable[[], frozenset[str]] = frozenset,
        names: str = r"[a-z][a-z0-9_]*",
    ) -> None:
        self.group, self._kind = group, kind
        self._own, self._admit = own, admit
        self._reserved, self._names = reserved, names
        self._added: dict[str, list[Added]] | None = None
        self._loaded: dict[str, T] = {}
        self._refused: dict[str, str] = {}

    @property
    def own(self) -> Mapping[str, T]:
        """What this package brings."""
        return self._own()

    @property
    def added(self) -> Mapping[str, list[Added]]:
        """Name -> the packages that register it, mostly one; nothing is imported."""
        if self._added is None:
            found: dict[str, list[Added]] = {}
            for point in metadata.entry_points(group=self.group):
                about = point.dist
                named = f"{about.name} {about.version}" if about is not None else "some package"
                found.setdefault(point.name, []).append(
                    Added(point.name, named, point.value, point)
                )
            self._added = {name: found[name] for name in sorted(found)}
        return self._added

    def refresh(self) -> None:
        """Look anew for installed packages; a process sees those that were there when it was asked first."""
        self._added = None
        self._loaded.clear()
        self._refused.clear()

    def __iter__(self) -> Iterator[str]:
        yield from self.own
        yield from (name for name in self.added if name not in self.own)

    def __len__(self) -> int:
        return len(set(self.own) | set(self.added))

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in self.added

    def __getitem__(self, name: str) -> T:
        """What a name stands for; this package's own whatever others register.

        Raises:
            KeyError: nobody has the name.
            PluginError: a package has, and it cannot be used.
        """
        own = self.own.get(name)
        if own is not None:
            return own
        if name not in self._loaded:
            self.check(name)
        return self._loaded[name]

    def check(self, name: str) -> None:
        """Refuse a name that cannot be used, or whose meaning is not plain.

        Raises:
            KeyError, PluginError: as by ``[]``; also where a package registers one of this package's names.
        """
        if name in self._loaded:
            return
        if name not in self._refused:
            found = self.added.get(name, ())
            if not found:
                if name in self.own:
                    return
                raise KeyError(name)
            try:
                self._loaded[name] = self._load(name, found)
                return
            except PluginError as error:
                self._refused[name] = str(error)
        raise PluginError(self._refused[name])

    def usable(self) -> dict[str, T]:
        """All that can be used, by name; packages that cannot are left out."""
        found = {}
        for name in self:
            try:
                self.check(name)
            except PluginError:
                continue
            found[name] = self[name]
        return found

    def faults(self) -> list[str]:
        """Why each name that packages register in vain cannot be used."""
        found = []
        for name in self.added:
            try:
                self.check(name)
            except PluginError as error:
                found.append(str(error))
        return found

    def _load(self, name: str, found: list[Added]) -> T:
        thing = f"{self._kind} {name!r}"
        if name in self.own:
            raise PluginError(
                f"{thing} is one of {OURS}'s own, and {found[0]} registers another one by that name; rename it "
                "there, or uninstall that package"
            )
        if len(found) > 1:
            raise PluginError(
                f"{thing} is registered by {' and by '.join(map(str, found))}; uninstall all but one of them"
            )
        (one,) = found
        if not re.fullmatch(self._names, name) or name in self._reserved():
            raise PluginError(
                f"{one} registers a {thing}, which cannot be its name: it must match {self._names}, and be no "
                "word that means something else; rename it there"
            )
        try:
            brought = one.point.load()
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{thing} of {one} cannot be imported: {type(error).__name__}: {error}; mend or uninstall "
                "that package"
            ) from error
        try:
            return self._admit(one, brought)
        except ValueError as error:
            raise PluginError(f"{thing} of {one} cannot be used: {error}") from error
