"""The backward pass that is under way: its number, and its end."""

from __future__ import annotations

from collections.abc import Callable

from torch._C import _current_graph_task_id as current_pass
from torch.autograd import Variable

__all__ = ["NO_PASS", "call_at_end", "current_pass"]

NO_PASS = -1


def call_at_end(callback: Callable[[], None]) -> bool:
    """Call ``callback`` when the pass that is under way ends; ``False`` outside of one, or of one that runs to no end.

    Example:
        >>> call_at_end(print)
        False
    """
    if current_pass() == NO_PASS:
        return False
    try:
        Variable._execution_engine.queue_callback(callback)
    except RuntimeError:  # a pass that only records itself, to be compiled
        return False
    return True
