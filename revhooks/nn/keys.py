"""Loading the state dict of a module from before it was wrapped."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["TakesKeys"]


class TakesKeys(nn.Module):
    """A module whose ``load_state_dict`` also takes the keys that it had before its parts were wrapped.

    Its own ``state_dict`` has the paths of its modules, as any. ``takes_keys`` maps prefixes there to prefixes here.

    Example:
        >>> class Wrapped(TakesKeys):
        ...     def __init__(self, f):
        ...         super().__init__()
        ...         self.f = f
        ...         self.takes_keys = {"": "f."}
        >>> linear = nn.Linear(2, 2)
        >>> Wrapped(nn.Linear(2, 2)).load_state_dict(linear.state_dict())
        <All keys matched successfully>
        >>> list(Wrapped(linear).state_dict())
        ['f.weight', 'f.bias']
    """

    takes_keys: dict[str, str]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own = {prefix + key for key in self.state_dict()}
        given = [key for key in state_dict if key.startswith(prefix)]
        renamed = {self._here(key, prefix): key for key in given}
        if not own <= set(given) and own <= set(renamed):
            entries = {here: state_dict.pop(there) for here, there in renamed.items()}
            state_dict.update(entries)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _here(self, key: str, prefix: str) -> str:
        rest = key.removeprefix(prefix)
        there = max((start for start in self.takes_keys if rest.startswith(start)), key=len, default=None)
        return key if there is None else prefix + self.takes_keys[there] + rest.removeprefix(there)
