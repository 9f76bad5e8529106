"""Reversible blocks of other libraries: ``with reversible():`` around code that uses them, unmodified.

Each file has the table of one library: which of its classes are inverted, replayed or left alone. A table is active when its
library has been imported by the time a context is entered, or when its file is imported: ``import revhooks.adapters.zuko``.
Nothing is imported that is not there. ``reversible(adapters=False)`` goes without; what you register yourself comes first.
"""

from __future__ import annotations

import importlib
import sys

from .table import Adapter, Block

__all__ = ["LIBRARIES", "Adapter", "Block", "adapt", "adapter_of"]

# of each library the file with its table
LIBRARIES = {
    "FrEIA": "freia",
    "memcnn": "memcnn",
    "momentumnet": "momentumnet",
    "nflows": "nflows",
    "normflows": "normflows",
    "revlib": "revlib",
    "revtorch": "revtorch",
    "torch.distributions": "distributions",
    "torch_geometric": "torch_geometric",
    "zuko": "zuko",
}


_LOADED: dict[str, Adapter] = {}


def adapter_of(library: str) -> Adapter:
    """The table of a library.

    Raises:
        KeyError: there is none.

    Example:
        >>> adapter_of("zuko").versions
        '1.6'
    """
    if library not in _LOADED:
        _LOADED[library] = importlib.import_module(f".{LIBRARIES[library]}", __name__).ADAPTER
    return _LOADED[library]


def adapt() -> None:
    """Register what is known of the libraries that are imported by now."""
    for library in LIBRARIES:
        if library in sys.modules:
            adapter_of(library).install()
