"""Where the peers fail and revhooks does not: the cases of `bench/semantics.py`, in this process.

A peer's failure is asserted where it is the same on every run; what kills the process or reads freed memory is told by the
bench only.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest

from tests.devices import DEVICE

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import semantics  # noqa: E402
from semantics import cell  # noqa: E402
from semantics_cases import CASES, EVERY, LIMITS  # noqa: E402
from semantics_contenders import CONTENDERS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*destroy_process_group.*", "ignore:.*[Gg]loo.*")
OURS = [name for name in CONTENDERS if name.startswith("revhooks")]
PEERS = [name for name, contender in CONTENDERS.items() if name not in OURS and contender.package != "torch"]


def needs(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(CONTENDERS[name].package)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OURS)
def test_ours_is_as_plain_in_every_case(name: str, case: str) -> None:
    if case == "distributed" and DEVICE.type == "other":
        pytest.skip("gloo does not know that device")
    outcome = cell(name, case, in_process=True)
    assert outcome.word == "ok", outcome.detail


TOLD = {"cached": "ReplayError", "own_generator": "Error: ", "forward_hooks": "2 instead of 1"}


@pytest.mark.parametrize(("case", "detail"), TOLD.items())
@pytest.mark.parametrize("name", OURS)
def test_limits_are_told(name: str, case: str, detail: str) -> None:
    """Once it does one of them, its line belongs to the other cases."""
    assert case in LIMITS
    assert detail in cell(name, case, in_process=True).detail


@pytest.mark.parametrize("name", PEERS)
def test_adapters_do_the_basic_case(name: str) -> None:
    needs(name)
    outcome = cell(name, "basic", in_process=True)
    assert (outcome.word, outcome.options) == ("ok", None), outcome.detail


FAILURES = [
    ("checkpoint", "numpy_noise", "wrong", "gradients off by"),
    ("checkpoint", "batch_norm", "wrong", "running_mean off by"),
    ("checkpoint", "parameter_changed", "wrong", "in silence"),
    ("memcnn", "dropout", "wrong", "gradients off by"),
    ("memcnn", "of_inputs", "error", "not compatible with .grad()"),
    ("memcnn", "batch_norm", "wrong", "running_mean off by"),
    ("memcnn", "unused_parameter", "error", "allow_unused"),
    ("revlib", "of_parameters", "error", "appears to not have been used in the graph"),
    ("revlib", "no_grad_input", "error", "does not require grad"),
    ("RevTorch", "output_changed", "wrong", "gradients off by"),
    ("RevTorch", "penalty", "error", "must not require grad"),
    ("invtorch", "dropout", "wrong", "gradients off by"),
    ("momentumnet", "dropout", "wrong", "gradients off by"),
    ("momentumnet", "frozen", "error", "IndexError"),
]


@pytest.mark.parametrize(("name", "case", "word", "detail"), FAILURES, ids=[f"{name}-{case}" for name, case, *_ in FAILURES])
def test_a_peer_fails_where_ours_does_not(name: str, case: str, word: str, detail: str) -> None:
    """By default; what its options do is in the table."""
    needs(name)
    outcome = semantics.attempt(EVERY[case], CONTENDERS[name], {})
    assert outcome.word == word
    assert detail in outcome.detail
    assert cell("revhooks", case, in_process=True).word == "ok"


def test_the_bench_can_tell() -> None:
    """The judge finds what it is there for."""
    import torch

    a, zero = torch.ones(3), torch.zeros(3)
    same = {"gradients": [a, None], "left": {"bytes": 0, "objects a step": 0}}
    assert semantics.judge([same], [{**same, "gradients": [a, zero]}], 1e-8).word == "ok"
    assert semantics.judge([same], [{**same, "gradients": [2 * a, None]}], 1e-8).detail == "gradients off by 1"
    assert semantics.judge([same], [{**same, "gradients": [a * float("nan"), None]}], 1e-8).word == "wrong"
    assert semantics.judge([{"gradients": [None]}], [{"gradients": [a]}], 1e-8).detail.endswith("plain autograd writes none")
    left = {**same, "left": {"bytes": 2048, "objects a step": 3}}
    assert semantics.judge([same], [left], 1e-8) == semantics.Outcome("leak", "2.0 KiB of tensors left, 3 objects a step")
    assert semantics.judge([{"raised": True}], [{"raised": False, "instead": "silence"}], 1e-8).word == "wrong"


def test_the_recorded_table() -> None:
    """What is printed in the documentation covers every case, and says of ours what the tests say."""
    recorded = json.loads(semantics.RESULTS.read_text())
    assert list(recorded["cases"]) == list(EVERY)
    for key, case in recorded["cases"].items():
        assert list(case["outcomes"]) == list(CONTENDERS)
        assert (key in LIMITS) == any(case["outcomes"][name]["word"] != "ok" for name in OURS)
        assert case["title"] in semantics.PAGE.read_text()
