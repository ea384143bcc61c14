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


def adopt(instance: Any, ours: type[Any], **attributes: Any) -> None:
    """Put the methods of ``ours`` before those of the instance's own class.

    Args:
        instance: any object whose class keeps its state in a ``__dict__``.
        ours: a mixin whose methods call ``super()``.
        attributes: what these methods read of the instance, each annotated in ``ours``.

    Raises:
        TypeError: the instance was adopted already, keeps its state elsewhere, or an attribute is none of
            ``ours``. All are faults of this package or a change of vLLM's, never of the user's.
    """
    kind = type(instance)
    known = {name for base in ours.__mro__ for name in base.__dict__.get("__annotations__", ())}
    if strange := sorted(attributes.keys() - known):
        raise TypeError(f"{ours.__name__} has no attribute {', '.join(strange)}")
    if isinstance(instance, ours):
        raise TypeError(f"{kind.__name__} has the methods of {ours.__name__} already")
    try:
        instance.__class__ = _derived(kind, ours)
    except TypeError as error:
        raise TypeError(
            f"a {kind.__name__} of this vLLM cannot take the methods of {ours.__name__} ({error}); "
            "serve this model without additional_config['vllm_flow']."
        ) from None
    vars(instance).update(attributes)


@cache
def _derived(kind: type[Any], ours: type[Any]) -> type[Any]:
    """A class of ``kind``'s memory layout that looks for methods in ``ours`` first.

    One for all objects of a kind: vLLM may compare their types.

    A class has the layout of its first base, and an object takes only a class of its own layout. For an
    ordinary class any first base would do; one whose own first base is a ``Protocol`` (vLLM's Transformers
    backend) or an abstract class has another layout than a mixin.
    """
    name = f"Flow{kind.__name__}"
    if issubclass(ours, kind):
        derived = types.new_class(name, (ours,))
        derived.__module__ = ours.__module__
        return derived
    order = types.new_class(name, (ours, kind)).__mro__[1:]

    class OursFirst(type(kind)):  # type: ignore[misc]
        def mro(cls) -> list[type[Any]]:
            return [cls, *order]

    derived = types.new_class(name, (kind, ours), {"metaclass": OursFirst})
    derived.__module__ = ours.__module__
    return derived
