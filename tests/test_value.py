"""What is made halfway complains of nothing when it goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from revhooks.runtime.handles.value import Value
from revhooks.runtime.run import Run
from revhooks.storage import Held, Ledger


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("made", ["value", "value whose run has no room", "held"])
def test_an_error_while_it_is_made(made: str, monkeypatch: pytest.MonkeyPatch, no_gc: None) -> None:
    run = Run()
    sparse = torch.eye(3).to_sparse()  # has no storage
    if made == "value":
        with pytest.raises(NotImplementedError):
            Value(run, sparse, "", "")
    else:

        def hold(self: Any, key: int, nbytes: int) -> None:
            raise MemoryError

        monkeypatch.setattr(Ledger, "hold", hold)
        with pytest.raises(MemoryError):
            Held(run.ledger, torch.ones(3)) if made == "held" else Value(run, torch.ones(3), "", "")
    assert run.ledger.held == 0
    assert not run.values
