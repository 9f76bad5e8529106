"""Places of a step: what was found where, when the same model was there before.

A step saves the same tensors in the same order as the one before, as a rule. So the number of a tensor in its step and the kind
of the node that made it tell what was learned of it. Where they do not it is looked for again, which takes time only.
"""

from __future__ import annotations

import weakref

from torch import Tensor

__all__ = ["IN_VAIN", "Places", "Site", "places_of"]

IN_VAIN = 4  # searches, after which a place is looked at only now and then
_AGAIN = 16
_MANY = 1 << 14
_MODELS = 64


class Site:
    """What was found to compute what is there.

    Attributes:
        site: where in the code, and of what.
        names: of the nodes.
        met: how often it was there.
    """

    __slots__ = ("met", "names", "site")

    def __init__(self, site: object, names: list[str]) -> None:
        self.site = site
        self.names = names
        self.met = 0


class Places:
    """Of the steps of one model, or of what is run again in blocks.

    Attributes:
        sites: by place.
    """

    __slots__ = ("_vain", "sites")

    def __init__(self) -> None:
        self.sites: dict[object, Site] = {}
        self._vain: dict[object, int] = {}  # searches in vain, negative; then how often a place is passed over

    def passes_over(self, place: object) -> bool:
        """Whether nothing was found there, so often that it is not looked for now."""
        left = self._vain.get(place, 0)
        if left <= 0:
            return False
        self._vain[place] = left - 1 if left > 1 else 1 - IN_VAIN
        return True

    def note(self, place: object, found: bool) -> None:
        """Whether something was found there."""
        if found:
            self._vain.pop(place, None)
            return
        left = self._vain.get(place, 0) - 1
        if len(self._vain) > _MANY:
            self._vain.clear()
        self._vain[place] = left if left > -IN_VAIN else _AGAIN

    def learn(self, place: object, site: Site) -> None:
        """A new one."""
        if len(self.sites) > _MANY:
            self.sites.clear()
        self.sites[place] = site
        self._vain.clear()


_models: dict[int, tuple[weakref.ref[Tensor], Places]] = {}


def places_of(parameter: Tensor) -> Places:
    """Of steps that save this parameter first."""
    known = _models.get(id(parameter))
    if known is None or known[0]() is not parameter:
        if len(_models) >= _MODELS:
            _models.clear()
        known = _models[id(parameter)] = weakref.ref(parameter), Places()
    return known[1]
