"""Gives a live object of vLLM's a class of ours: the one place that assigns ``__class__``.

vLLM builds its model runner, its model state and its KV-cache manager itself, deep inside functions
that choose among subclasses (by platform, by model, by a model's own hook), and offers no setting
for them. Copying those functions would tie us to a version; wrapping the object would miss the calls
it makes on itself. So the finished object keeps its state and takes a class that derives from its
own. Where vLLM has a setting (``worker_cls``, ``scheduler_cls``) we use that instead.
"""

from __future__ import annotations

import types
from functools import cache
from typing import Any


def adopt(instance: Any, ours: type[Any]) -> None:
    """Put the methods of ``ours`` before those of the instance's own class.

    Args:
        instance: any object whose class keeps its state in a ``__dict__``.
        ours: a mixin whose methods call ``super()``; its annotations name the attributes that the
            caller sets afterwards. Beside an abstract base class it must derive from that base: an
            object only takes a class of the same memory layout.

    Raises:
        TypeError: the instance was adopted already, or the layouts differ. Both are faults of this
            package or a change of vLLM's, never of the user's.
    """
    kind = type(instance)
    if isinstance(instance, ours):
        raise TypeError(f"{kind.__name__} has the methods of {ours.__name__} already")
    try:
        instance.__class__ = _adopted(kind, ours)
    except TypeError as error:
        raise TypeError(
            f"a {kind.__name__} of this vLLM cannot take the methods of {ours.__name__}: {error}"
        ) from None


@cache
def _adopted(kind: type[Any], ours: type[Any]) -> type[Any]:
    """One class for all objects of a kind: vLLM may compare their types."""
    bases = (ours,) if issubclass(ours, kind) else (ours, kind)
    adopted = types.new_class(f"Flow{kind.__name__}", bases)
    adopted.__module__ = ours.__module__
    return adopted
