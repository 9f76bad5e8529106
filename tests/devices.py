"""Where the tests run: ``pytest --device cuda`` on that device, ``--far --threads`` on a CPU that is used as one.

Every suite runs there, new ones too: tensors and modules are made on the default device. What is about the CPU says so,
``pytestmark = pytest.mark.cpu(reason="...")`` for a file, and is skipped elsewhere.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["DEVICE", "generator", "in_a_thread", "random_states", "set_random_states"]

DEVICE = torch.device("cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("revhooks")
    group.addoption("--device", default="cpu", help="where tensors and modules are made: cpu, cuda, other (tests/other)")
    group.addoption("--far", action="store_true", help="take every device for one whose values take long to read")
    group.addoption("--threads", action="store_true", help="run each backward in a thread of its own, as a GPU does")


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is imported, for what modules make."""
    global DEVICE
    name = config.getoption("--device")
    if name == "cpu":
        return
    if name == "other":
        from tests.other import register

        register()
    elif name.startswith("cuda"):
        _repeatable()
    DEVICE = torch.zeros((), device=name).device
    torch.set_default_device(DEVICE)


def _repeatable() -> None:
    """Gradients are compared bit by bit: no atomics, no choice of algorithms, no TF32 (which has tests of its own)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what is about something else, and say why."""
    elsewhere, far = DEVICE.type != "cpu", config.getoption("--far")
    for item in items:
        cpu, near = (item.get_closest_marker(name) for name in ("cpu", "near"))
        if elsewhere and isinstance(item, pytest.DoctestItem):
            item.add_marker(pytest.mark.skip(reason="a doctest, of the CPU"))
        elif elsewhere and cpu is not None:
            item.add_marker(pytest.mark.skip(reason=f"about the CPU: {cpu.kwargs.get('reason', '')}"))
        elif (far or elsewhere) and near is not None:
            item.add_marker(pytest.mark.skip(reason=f"not where values are far: {near.kwargs.get('reason', '')}"))


def generator(seed: int = 0) -> torch.Generator:
    """A generator of the device that tensors are made on."""
    return torch.Generator(DEVICE).manual_seed(seed)


def random_states() -> list[Tensor]:
    """The states of torch's generators, the device's too."""
    states = [torch.get_rng_state()]
    if DEVICE.type != "cpu":
        states.append(getattr(torch, DEVICE.type).get_rng_state(DEVICE))
    return states


def set_random_states(states: list[Tensor]) -> None:
    """Set what `random_states` gives."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        getattr(torch, DEVICE.type).set_rng_state(state, DEVICE)


# -- backward in another thread

_BACKWARD = threading.local()


def _carried() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """What autograd carries to the threads of its devices: saved tensor hooks, dispatch modes, grad mode and autocast."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    modes = [torch._C._get_dispatch_stack_at(i) for i in range(torch._C._len_torch_dispatch_stack())]
    grad, autocast = torch.is_grad_enabled(), (torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu"))

    @contextlib.contextmanager
    def there() -> Iterator[None]:
        _BACKWARD.on = True
        with contextlib.ExitStack() as stack:
            if hooks is not None:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(*hooks))
            for mode in modes:
                torch._C._push_on_torch_dispatch_stack(mode)
                stack.callback(torch._C._pop_torch_dispatch_stack, None)
            stack.enter_context(torch.autocast("cpu", *autocast))
            stack.enter_context(torch.set_grad_enabled(grad))
            yield

    return there


def _is_batched(*given: Any) -> bool:
    """Whether a function transform is at work, whose levels belong to the thread."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return any(isinstance(leaf, Tensor) and torch._C._functorch.is_legacy_batchedtensor(leaf) for leaf in tree_leaves(given))


def _run_in_the_thread(work: Callable[[], None]) -> None:
    """The same each time, as autograd has one for each device; it holds nothing of ``work`` afterwards."""
    if threading.current_thread() is not threading.main_thread():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return
    if not hasattr(_BACKWARD, "queues"):
        _BACKWARD.queues = asked, done = SimpleQueue[Any](), SimpleQueue[None]()

        def serve() -> None:
            while True:
                asked.get()()
                done.put(None)

        threading.Thread(target=serve, daemon=True).start()
    asked, done = _BACKWARD.queues
    asked.put(work)
    done.get()


def in_a_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` in a thread of its own; what it calls itself stays in that thread, as in autograd's."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if getattr(_BACKWARD, "on", False) or _is_batched(args, kwargs):
            return function(*args, **kwargs)
        found: list[Any] = []
        raised: list[BaseException] = []
        there = _carried()

        def work() -> None:
            try:
                with there():
                    found.append(function(*args, **kwargs))
            except BaseException as error:
                raised.append(error)

        _run_in_the_thread(work)
        if raised:
            try:
                raise raised[0]
            finally:
                raised.clear()  # its traceback holds this frame
        return found[0]

    return call


@pytest.fixture(autouse=True)
def _as_an_accelerator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``--far`` and ``--threads`` ask for; a GPU tells what it has compared when it is asked, not when it has got there."""
    if request.config.getoption("--far"):
        from revhooks import storage

        monkeypatch.setattr(storage, "_NEAR", frozenset())
    if DEVICE.type == "cuda":
        from revhooks.runtime.policy import guard

        monkeypatch.setattr(guard._Flight, "landed", lambda flight: True)  # to be read it is waited for
    if request.config.getoption("--threads") and DEVICE.type == "cpu":
        for name in ("backward", "grad"):
            monkeypatch.setattr(torch.autograd, name, in_a_thread(getattr(torch.autograd, name)))
