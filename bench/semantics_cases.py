"""The cases of `semantics.py`: what plain PyTorch allows around a chain of blocks, each a small function of a `Trial`.

A case is run on the plain net and on a contender's, from the same parameters, inputs and generators. After every step the
gradients of the input and of all parameters are compared, all buffers, and what the case itself returns.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import random
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import semantics_branches as branches
import torch
from semantics_trial import Case, Result, Trial, difference, random_states, survivors
from torch import Tensor, nn


def loss(y: Tensor) -> Tensor:
    return y.square().mean()


# -- several calls, several backwards


def step(t: Trial) -> None:
    loss(t.net(t.h())).backward()


def siamese(t: Trial) -> None:
    (loss(t.net(t.h())) + 2 * loss(t.net(t.other()))).backward()


def two_forwards(t: Trial) -> None:
    first, second = loss(t.net(t.h())), loss(t.net(t.other()))
    first.backward()
    second.backward()


def accumulation(t: Trial) -> None:
    loss(t.net(t.h())).backward()
    loss(t.net(t.other())).backward()


def pipeline(t: Trial) -> None:
    parts = [part.clone() for part in t.x.chunk(3)]
    waiting = [loss(t.net(parts[0])), loss(t.net(parts[1]))]
    waiting.pop(0).backward()
    waiting.append(loss(t.net(parts[2])))
    for value in waiting:
        value.backward()


def retain(t: Trial) -> None:
    value = loss(t.net(t.h()))
    value.backward(retain_graph=True)
    value.backward()


def penalty(t: Trial) -> None:
    value = loss(t.net(t.h()))
    (grad,) = torch.autograd.grad(value, t.x, create_graph=True)
    (value + grad.square().sum()).backward()


def of_inputs(t: Trial) -> Result:
    return {"input gradient": list(torch.autograd.grad(loss(t.net(t.h())), t.x))}


def of_parameters(t: Trial) -> Result:
    return {"parameter gradients": list(torch.autograd.grad(loss(t.net(t.h())), t.parameters))}


def of_intermediates(t: Trial) -> Result:
    states = [t.h()]
    for block in t.blocks:
        states.append(block(states[-1]))
    return {"intermediate gradients": list(torch.autograd.grad(loss(states[-1]), states[1:-1]))}


def of_batches(t: Trial) -> Result:
    y = t.net(t.h()).mean(0)
    directions = torch.eye(len(y), dtype=y.dtype)
    return {"jacobian": list(torch.autograd.grad(y, t.x, directions, is_grads_batched=True))}


def into_inputs(t: Trial) -> None:
    loss(t.net(t.h())).backward(inputs=[t.x, t.parameters[3]])


def optimizer_inside(t: Trial) -> Result:
    def update(p: Tensor) -> None:
        with torch.no_grad():
            p.sub_(p.grad, alpha=0.05)

    handles = [p.register_post_accumulate_grad_hook(update) for p in t.parameters]
    step(t)
    for handle in handles:
        handle.remove()
    return {"parameters": [p.detach().clone() for p in t.parameters]}


def partial(t: Trial) -> None:
    early = t.blocks[0](t.h())
    first, _second = loss(early), loss(t.blocks[1](early))
    first.backward()


# -- how inputs and outputs are used


def unused_output(t: Trial) -> None:
    _unused = t.net(t.other())
    loss(t.net(t.h())).backward()


def reuse(t: Trial) -> None:
    h = t.h()
    loss(t.net(h) + h).backward()


def skip(t: Trial) -> None:
    first = t.blocks[0](t.h())
    last = t.blocks[2](t.blocks[1](first))
    loss(last + torch.tanh(first)).backward()


def relu_before(t: Trial) -> None:
    loss(t.net(torch.relu_(t.x * 1.5))).backward()


def relu_after(t: Trial) -> None:
    loss(torch.relu_(t.net(t.h()))).backward()


def output_changed(t: Trial) -> None:
    y = t.net(t.h())
    y.mul_(2.0)
    loss(y).backward()


def input_changed(t: Trial) -> None:
    h = t.h()
    value = loss(t.net(h))
    if not t.plain:  # what is right does not depend on it
        h.detach().add_(1.0)
    value.backward()


def parameter_changed(t: Trial) -> Result:
    loss(t.net(t.h())).backward()
    right = t.gradients()
    t.begin()
    value = loss(t.net(t.h()))
    with torch.no_grad():
        for p in t.parameters:
            p.add_(0.5)
    try:
        value.backward()
    except RuntimeError:
        t.begin()
        return {"raised": True}
    wrong = t.gradients()
    t.begin()
    return {"raised": False, "instead": f"gradients off by {difference(right, wrong):.2g}, in silence"}


# -- branches and modes


def generators(t: Trial) -> Result:
    step(t)
    states = {"torch": [state.tolist() for state in random_states()], "python": random.getstate(), "numpy": np.random.get_state()}
    return {"generators": {name: hashlib.sha1(repr(state).encode()).hexdigest()[:8] for name, state in states.items()}}


def evaluation(t: Trial) -> None:
    t.net.eval()
    step(t)


def eval_between(t: Trial) -> None:
    value = loss(t.net(t.h()))
    t.net.eval()
    value.backward()
    t.net.train()


def autocast(t: Trial) -> Result:
    with torch.autocast(t.data.device.type, torch.bfloat16):
        y = t.net(t.h())
    loss(y.float()).backward()
    return {"output": [y.detach().clone()]}


def without_grad(mode: Callable[[], contextlib.AbstractContextManager[Any]]) -> Callable[[Trial], Result]:
    def use(t: Trial) -> Result:
        h = t.data.clone()
        with mode():
            y = t.net(h)
        left = h.untyped_storage().nbytes()
        return {"input bytes": left, "input": [h.clone()] if left else [], "output": [y.clone()]}

    return use


def frozen(t: Trial) -> None:
    for branch in t.branches[:2]:
        branch.requires_grad_(False)
    step(t)


def frozen_between(t: Trial) -> None:
    value = loss(t.net(t.h()))
    t.net.requires_grad_(False)
    value.backward()
    t.net.requires_grad_(True)


def frozen_forward(t: Trial) -> None:
    t.net.requires_grad_(False)
    value = loss(t.net(t.h()))
    t.net.requires_grad_(True)
    value.backward()


def cached(t: Trial) -> None:
    with nn.utils.parametrize.cached():
        step(t)


def mask_of(t: Trial) -> Tensor:
    return (torch.arange(t.width) % 3 > 0).to(t.data.dtype)


def masked(t: Trial) -> None:
    loss(t.net(t.h(), mask_of(t))).backward()


def keyword(t: Trial) -> None:
    loss(t.net(t.h(), mask=mask_of(t))).backward()


def failed_forward(t: Trial) -> None:
    flaky: Any = t.branches[3]
    flaky.broken = True
    with contextlib.suppress(ValueError):
        t.net(t.h())
    flaky.broken = False
    step(t)


# -- behind autograd's back, and beside it


def reordered(t: Trial) -> None:
    """A shuffle between two operations under `no_grad`, in the third step."""
    h = t.blocks[1](t.blocks[0](t.h()))
    y = torch.tanh(h)
    t.data.count = getattr(t.data, "count", 0) + 1  # type: ignore[attr-defined]
    if t.data.count == 3:  # type: ignore[attr-defined]
        with torch.no_grad():
            h.copy_(h.flip(0))
    loss(t.blocks[2](torch.relu(h) + y)).backward()


def appending(t: Trial) -> Result:
    """The losses that branches leave in lists are part of the loss."""
    branches: list[Any] = t.branches
    value = loss(t.net(t.h())) + sum(loss for branch in branches for loss in branch.losses)
    value.backward()
    left = [(len(branch.losses), branch.calls) for branch in branches]
    for branch in branches:
        branch.losses.clear()
    return {"lists and counters": left, "loss": [value.detach()]}


class Tagged(torch.Tensor):
    """Stays what it is through every operation."""


def subclass(t: Trial) -> Result:
    y = t.net(t.h().as_subclass(Tagged))
    loss(y).backward()
    return {"class": type(y).__name__}


# -- lifetime


def after_step(t: Trial) -> Result:
    return survivors(t, step, collect=False)


def after_unused_output(t: Trial) -> Result:
    return survivors(t, unused_output, collect=True)


def after_no_backward(t: Trial) -> Result:
    def use(t: Trial) -> None:
        loss(t.net(t.h()))

    return survivors(t, use, collect=True)


# -- the user's objects


def twin_step(t: Trial, twin: nn.Module) -> Result:
    """Gradients of a copy, whose parameters come in another order in each library."""
    x = t.data.clone().requires_grad_()
    loss(twin(x.clone())).backward()
    total = sum((p.grad.square().sum() for p in twin.parameters() if p.grad is not None), torch.zeros(()))
    return {"gradients of the copy": [x.grad, total]}


def deepcopied(t: Trial) -> Result:
    value = loss(t.net(t.h()))
    twin = copy.deepcopy(t.net)
    value.backward()
    return twin_step(t, twin)


def saved(t: Trial) -> Result:
    value = loss(t.net(t.h()))
    file = io.BytesIO()
    torch.save(t.net, file)
    value.backward()
    file.seek(0)
    return twin_step(t, torch.load(file, weights_only=False))


def keys(t: Trial) -> Result:
    step(t)
    return {"keys": sorted(t.net.state_dict())}


def distributed(t: Trial) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "store").as_uri()
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        try:
            net = nn.parallel.DistributedDataParallel(t.net)
            loss(net(t.h())).backward()
            loss(net(t.other())).backward()
            del net
        finally:
            torch.distributed.destroy_process_group()


def other_thread(t: Trial) -> None:
    value = loss(t.net(t.h()))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(value.backward).result()


def backward_hooks(t: Trial) -> Result:
    seen: dict[nn.Module, list[Tensor]] = {t.net: [], t.branches[0]: []}

    def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
        seen[module].append(outputs[0].clone())

    handles = [module.register_full_backward_hook(hook) for module in seen]
    step(t)
    for handle in handles:
        handle.remove()
    return {
        "hook calls": [len(calls) for calls in seen.values()],
        "hooked gradients": [g for calls in seen.values() for g in calls],
    }


def forward_hooks(t: Trial) -> Result:
    calls: SimpleQueue[int] = SimpleQueue()  # a list would be put back after a replay
    handle = t.branches[0].register_forward_hook(lambda module, inputs, output: calls.put(1))
    step(t)
    handle.remove()
    return {"hook calls": calls.qsize()}


CASES: dict[str, Case] = {
    "basic": Case("one step, MLP branches", step, steps=3),
    "conv": Case("one step, conv branches", step, branch=branches.conv),
    "shared": Case("one pair of branches in all blocks", step, shared=True),
    "siamese": Case("Siamese: called twice before one backward", siamese),
    "two_forwards": Case("two forwards, then both backwards", two_forwards),
    "accumulation": Case("gradient accumulation", accumulation),
    "pipeline": Case("1F1B micro-batches: f1 f2 b1 f3 b2 b3", pipeline),
    "retain": Case("`retain_graph=True` and a second backward", retain),
    "penalty": Case("double backward: gradient penalty", penalty),
    "of_inputs": Case("`autograd.grad` of the input only", of_inputs),
    "of_parameters": Case("`autograd.grad` of the parameters only", of_parameters),
    "of_intermediates": Case("`autograd.grad` of outputs between blocks", of_intermediates, split=True),
    "of_batches": Case("`autograd.grad` of a batch of directions", of_batches),
    "into_inputs": Case("`backward(inputs=...)`", into_inputs),
    "optimizer_inside": Case("optimizer steps inside backward, by hooks", optimizer_inside),
    "partial": Case("backward of one of two losses", partial, split=True),
    "unused_output": Case("an output that is never used", unused_output),
    "unused_parameter": Case("a parameter that is never used", step, branch=branches.Unused),
    "reuse": Case("`net(h) + h`", reuse),
    "skip": Case("skip connection over blocks", skip, split=True),
    "no_grad_input": Case("an input that does not require grad", step, grad=False),
    "dropout": Case("dropout in branches", step, branch=branches.dropout),
    "python_noise": Case("noise from Python's `random` in branches", step, branch=branches.PythonNoise),
    "numpy_noise": Case("noise from numpy in branches", step, branch=branches.NumpyNoise),
    "generators": Case("generators after a step with dropout", generators, branch=branches.dropout),
    "batch_norm": Case("BatchNorm: running statistics after 3 steps", step, branch=branches.norm, steps=3),
    "cumulative": Case("BatchNorm with `momentum=None`", step, branch=branches.cumulative, steps=3),
    "spectral": Case("spectral norm in branches", step, branch=branches.spectral, steps=3),
    "counting": Case("a buffer that every call replaces, two forwards", two_forwards, branch=branches.Counting),
    "carrying": Case("a state in an attribute, carried from call to call", two_forwards, branch=branches.Carrying),
    "slope": Case("a gradient taken inside of branches", step, branch=branches.Slope),
    "evaluation": Case("a step in eval mode", evaluation, branch=branches.norm),
    "eval_between": Case("`eval()` between forward and backward", eval_between, branch=branches.norm),
    "autocast": Case("autocast, CPU, bfloat16", autocast, dtype=torch.float32, tolerance=0.03),
    "relu_before": Case("in-place ReLU before the chain", relu_before),
    "relu_inside": Case("in-place ReLU in branches", step, branch=branches.relu_inside),
    "relu_after": Case("in-place ReLU after the chain", relu_after),
    "relu_first": Case("branches that change their input in place", step, branch=branches.relu_first),
    "output_changed": Case("output changed in place before backward", output_changed, may_raise=True),
    "input_changed": Case("input changed in place before backward", input_changed, may_raise=True),
    "parameter_changed": Case("parameters changed in place before backward", parameter_changed, steps=1),
    "no_grad": Case("forward under `no_grad`: output right, input left alone", without_grad(torch.no_grad)),
    "inference": Case("forward under `inference_mode`: the same", without_grad(torch.inference_mode)),
    "frozen": Case("a frozen first block", frozen),
    "frozen_between": Case("frozen between forward and backward", frozen_between),
    "frozen_forward": Case("frozen in forward only, as a GAN's critic", frozen_forward),
    "mask": Case("a mask, passed to branches by position", masked, branch=branches.Masked),
    "keyword": Case("a mask, passed to branches by keyword", keyword, branch=branches.Masked),
    "reordered": Case("a stream reordered under `no_grad`, now and then", reordered, steps=4, split=True, may_raise=True),
    "reusing": Case("a backward that writes into what it saved", step, branch=branches.Reusing),
    "appending": Case("auxiliary losses in lists, and counters", appending, branch=branches.Appending, steps=3),
    "quantised": Case("a weight without gradient that carries its scale", step, branch=branches.Quantised),
    "sparse": Case("a sparse buffer", step, branch=branches.Sparse),
    "subclass": Case("an input of a subclass of `Tensor`", subclass),
    "directional": Case("`torch.func.jvp` in branches", step, branch=branches.Directional),
    "recurrent": Case("a GRU in branches", step, branch=branches.recurrent),
    "failed_forward": Case("an exception in forward, then a step", failed_forward, branch=branches.Flaky),
    "after_step": Case("nothing survives a step, collector off", after_step, steps=1),
    "after_unused": Case("nothing survives an unused output", after_unused_output, steps=1),
    "after_no_backward": Case("nothing survives a forward without backward", after_no_backward, steps=1),
    "deepcopy": Case("`deepcopy` between forward and backward", deepcopied),
    "save": Case("`torch.save` of the net between forward and backward", saved),
    "keys": Case("`state_dict` keys are those of plain training", keys, twin=True),
    "distributed": Case("DistributedDataParallel, gloo, one process", distributed),
    "other_thread": Case("backward in another thread", other_thread),
    "backward_hooks": Case("`register_full_backward_hook` on net and branch", backward_hooks),
    "checkpoint": Case("`torch.utils.checkpoint` inside branches", step, branch=branches.Checkpointed),
}

# What revhooks does not do: told beside its cases, and moved there when it does
LIMITS: dict[str, Case] = {
    "cached": Case("spectral norm under `parametrize.cached()`", cached, branch=branches.spectral),
    "own_generator": Case("a branch that draws from a generator of its own", step, branch=branches.OwnGenerator),
    "forward_hooks": Case("forward hooks of branches fire once a call", forward_hooks),
}
EVERY = CASES | LIMITS
