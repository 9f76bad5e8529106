"""What this package uses of torch that torch does not promise: a name that is gone is told here in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revhooks
from revhooks import ops, private, tracing
from revhooks.ops import operation
from revhooks.saved import Source

PACKAGE = Path(revhooks.__file__).parent
OPTIONAL = {  # looked up, and done without
    "torch._C._dynamo",
    "torch._dynamo.compiled_autograd",
    "torch._dynamo.utils",
    "torch.cuda.memory._set_memory_metadata",
    "torch.cuda.memory._snapshot",
    "torch.ops.aten._fused_rms_norm",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported",
}


def test_every_private_name_that_is_used_is_listed() -> None:
    used = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name == "private.py":
            continue
        text = path.read_text()
        text = text.replace("Variable._execution_engine", "torch.autograd.Variable._execution_engine")
        used |= set(re.findall(r"\btorch(?:\.\w+)*\._\w+(?:\.\w+)*", text))
        for module, names in re.findall(r"^from (torch\.[\w.]*) import (.*)$", text, re.MULTILINE):
            for name in (part.split(" as ")[0].strip() for part in names.strip("()").split(",")):
                used |= {f"{module}.{name}"} if "._" in f"{module}.{name}" else set()
    listed = {*private.REQUIRED, *private.PREDICTING} | OPTIONAL
    tools = {"torch.utils._python_dispatch.TorchDispatchMode", "torch.utils._pytree.tree_leaves", "torch.utils._pytree"}
    tools |= {"torch.distributed._tools.mem_tracker", "torch.nn.modules.dropout._DropoutNd"}  # of profiler/, and a class
    known = listed | tools
    unlisted = {
        name
        for name in used
        if "__" not in name and not any(f"{one}.".startswith(f"{name}.") or name.startswith(f"{one}.") for one in known)
    }
    assert not unlisted, f"private names of torch that revhooks.private does not list: {sorted(unlisted)}"


@pytest.mark.parametrize("name", [*private.REQUIRED, *private.PREDICTING])
def test_torch_has_the_private_name(name: str) -> None:
    assert not private.missing((name,)), f"torch {torch.__version__} has no {name} any more: revhooks cannot be imported"


def test_a_torch_that_lacks_one_is_refused_in_words() -> None:
    with pytest.raises(ImportError, match=r"none of the name torch\._C\._no_such_name.*Remedy"):
        private.require(("torch._C._current_graph_task_id", "torch._C._no_such_name"))


@pytest.mark.parametrize(
    "name", ["set_eval_frame", "get_eval_frame_callback", "set_code_exec_strategy", "_FrameExecStrategy", "_FrameAction"]
)
def test_torch_has_what_keeps_dynamo_out(name: str) -> None:
    assert hasattr(tracing._dynamo, name), f"torch {torch.__version__} has no {name} any more: dynamo compiles frames of revhooks"


class Handle(Source):
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()

    def get(self) -> Tensor:
        return self.tensor


def handled(program: Callable[..., Tensor], *shape: int) -> Any:
    """The node of what a program makes of a tensor that needs a gradient and was made by an operation."""
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(Handle, Handle.get):
        x = torch.rand(*shape, requires_grad=True) * 1
        return program(x).grad_fn


def _norm(x: Tensor, training: bool) -> Tensor:
    layer = nn.BatchNorm1d(x.shape[1])
    return layer.train(training)(x)


BATCH = "_raw_saved_input _raw_saved_weight _raw_saved_running_mean _raw_saved_running_var _raw_saved_result1 _raw_saved_result2"
SHAPE = "next_functions _input_metadata"
# node: a program that ends in it, the shape of its input, what is read of it
NODES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], str]] = {
    "AddBackward0": (lambda x: x + x * 2, (3,), f"_saved_alpha {SHAPE}"),
    "AliasBackward0": (lambda x: torch.ops.aten.alias(x), (3,), "next_functions"),
    "CatBackward0": (lambda x: torch.cat([x, x]), (3,), f"_saved_dim {SHAPE}"),
    "CloneBackward0": (lambda x: x.clone(), (3,), "next_functions"),
    "ConstantPadNdBackward0": (lambda x: F.pad(x, (1, 1)), (3,), "_saved_pad next_functions"),
    "CosBackward0": (torch.cos, (3,), "_raw_saved_self"),
    "DivBackward0": (lambda x: x / (x + 1), (3,), "_raw_saved_self _raw_saved_other next_functions"),
    "EluBackward0": (F.elu, (3,), "_raw_saved_self _saved_alpha _saved_scale _saved_input_scale"),
    "ExpBackward0": (torch.exp, (3,), "next_functions"),
    "ExpandBackward0": (lambda x: x.expand(2, 3), (3,), SHAPE),
    "GeluBackward0": (F.gelu, (3,), "_raw_saved_self _saved_approximate"),
    "HardsigmoidBackward0": (F.hardsigmoid, (3,), "_raw_saved_self"),
    "HardswishBackward0": (F.hardswish, (3,), "_raw_saved_self"),
    "HardtanhBackward0": (F.hardtanh, (3,), "_raw_saved_self _saved_min_val _saved_max_val"),
    "LeakyReluBackward0": (F.leaky_relu, (3,), "_raw_saved_self _saved_negative_slope"),
    "LogSigmoidBackward0": (F.logsigmoid, (3,), "_raw_saved_self"),
    "MishBackward0": (F.mish, (3,), "_raw_saved_self"),
    "MulBackward0": (lambda x: x * (x + 1), (3,), "_raw_saved_self _raw_saved_other next_functions"),
    "NativeBatchNormBackward0": (lambda x: _norm(x, True), (4, 3), f"{BATCH} _saved_eps _saved_training {SHAPE}"),
    "NativeGroupNormBackward0": (
        lambda x: nn.GroupNorm(1, 3)(x),
        (4, 3, 2),
        "_raw_saved_input _raw_saved_weight _saved_eps _saved_group next_functions",
    ),
    "NativeLayerNormBackward0": (
        lambda x: nn.LayerNorm(8)(x),
        (4, 8),
        f"_raw_saved_input _raw_saved_weight _raw_saved_bias _raw_saved_result2 _saved_normalized_shape {SHAPE}",
    ),
    "NegBackward0": (torch.neg, (3,), "next_functions"),
    "PermuteBackward0": (lambda x: x.permute(1, 0), (3, 2), "_saved_dims next_functions"),
    "PowBackward0": (lambda x: x**3, (3,), "_raw_saved_self _saved_exponent"),
    "ReluBackward0": (torch.relu, (3,), "next_functions"),
    "RsqrtBackward0": (torch.rsqrt, (3,), "next_functions"),
    "SigmoidBackward0": (torch.sigmoid, (3,), "next_functions"),
    "SiluBackward0": (F.silu, (3,), "_raw_saved_self"),
    "SinBackward0": (torch.sin, (3,), "_raw_saved_self"),
    "SliceBackward0": (lambda x: x[1:], (3,), f"_saved_dim _saved_start _saved_end _saved_step _saved_self_sym_sizes {SHAPE}"),
    "SoftplusBackward0": (F.softplus, (3,), "_raw_saved_self _saved_beta _saved_threshold"),
    "SplitBackward0": (lambda x: x.split(2)[0], (4,), "_saved_split_size _saved_dim next_functions"),
    "SplitWithSizesBackward0": (lambda x: x.split([1, 3])[0], (4,), "_saved_split_sizes _saved_dim next_functions"),
    "SqrtBackward0": (torch.sqrt, (3,), "next_functions"),
    "SqueezeBackward0": (lambda x: x.squeeze(), (3, 1), SHAPE),
    "SqueezeBackward1": (lambda x: x.squeeze(1), (3, 1), SHAPE),
    "SubBackward0": (lambda x: x - x * 2, (3,), f"_saved_alpha {SHAPE}"),
    "TBackward0": (lambda x: x.t(), (3, 2), "next_functions"),
    "TanhBackward0": (torch.tanh, (3,), "next_functions"),
    "ToCopyBackward0": (lambda x: x.double(), (3,), SHAPE),
    "TransposeBackward0": (lambda x: x.transpose(0, 1), (3, 2), "_saved_dim0 _saved_dim1 next_functions"),
    "UnbindBackward0": (lambda x: x.unbind()[0], (3,), "_saved_dim next_functions"),
    "UnsafeViewBackward0": (lambda x: torch.ops.aten._unsafe_view(x, [3, 2]), (2, 3), SHAPE),
    "UnsqueezeBackward0": (lambda x: x.unsqueeze(0), (3,), SHAPE),
    "ViewBackward0": (lambda x: x.view(2, 3), (6,), SHAPE),
}
ELSEWHERE = {  # no program on a CPU makes one
    "CudnnBatchNormBackward0",
    "FusedRmsNormBackward0",
    "MiopenBatchNormBackward0",
    "NormaliseBackward",  # of this package
    "ReshapeAliasBackward0",
}


def test_every_node_that_is_known_is_in_the_table() -> None:
    assert set(NODES) | ELSEWHERE == set(ops._OPERATIONS) | set(ops._PARTS)


@pytest.mark.parametrize("name", NODES)
def test_torch_has_the_attributes_of_the_node(name: str) -> None:
    program, shape, attributes = NODES[name]
    node = handled(program, *shape)
    if name == "NativeGroupNormBackward0" and torch.__version__ >= "2.14":
        assert operation(node) is None  # it saves no eps any more
        return
    assert type(node).__name__ == name, f"torch has renamed {name} to {type(node).__name__}: recomputation of it is off"
    for attribute in attributes.split():
        assert hasattr(node, attribute), f"torch has renamed {attribute} of {name}: recomputation of {name} is off"
    assert operation(node) is not None, f"what {name} says is not what it said: recomputation of {name} is off"


def test_torch_has_what_is_read_of_every_node() -> None:
    node = handled(torch.cos, 3)
    says = "torch has renamed {} of {}: recomputation is off"
    assert hasattr(node, "metadata"), says.format("metadata", "nodes")
    assert hasattr(node._raw_saved_self, "data"), says.format("data", "a node's saved tensors")
    for attribute in ("shape", "dtype", "device"):
        assert hasattr(node._input_metadata[0], attribute), says.format(attribute, "_input_metadata")
    leaf = torch.ones(2, requires_grad=True)
    assert (leaf * 2).grad_fn.next_functions[0][0].variable is leaf, says.format("variable", "AccumulateGrad")


class Lacking:
    """A node without one of its attributes."""

    def __init__(self, node: Any, attribute: str) -> None:
        self._node, self._attribute = node, attribute

    def __getattr__(self, name: str) -> Any:
        if name == self._attribute:
            raise AttributeError(name)
        return getattr(self._node, name)


@pytest.mark.parametrize(
    ("name", "attribute"), [(name, a) for name, (_, _, attributes) in NODES.items() for a in attributes.split()]
)
def test_a_node_that_lacks_an_attribute_is_not_recomputed(name: str, attribute: str) -> None:
    program, shape, _ = NODES[name]
    node = handled(program, *shape)
    fake = type(name, (Lacking,), {})(node, attribute)
    found = operation(fake)  # type: ignore[arg-type]
    if found is not None:  # by what else it says
        assert name in ("MulBackward0", "DivBackward0") or attribute in BATCH or attribute.startswith(("next", "_input"))


def test_an_error_of_a_source_is_not_swallowed() -> None:
    """Only what torch's nodes lack is passed over."""

    class Broken(Handle):
        def get(self) -> Tensor:
            raise AttributeError("of somebody else")

    with torch.autograd.graph.saved_tensors_hooks(Broken, Handle.get):
        y = F.layer_norm(torch.rand(2, 4, requires_grad=True) * 1, (4,))
    with pytest.raises(AttributeError, match="of somebody else"):
        operation(y.grad_fn)  # type: ignore[arg-type]


# -- batch norms of other backends, of which there is none on a CPU


class Meta(SimpleNamespace):
    pass


def fake_batch_norm(kind: str, x: Tensor, layer: Any, training: bool) -> Any:
    """A node as `torch.autograd` makes it for another backend (derivatives.yaml)."""

    def saved(tensor: Tensor | None) -> Any:
        return Meta(data=None if tensor is None else Handle(tensor))

    attributes: dict[str, Any] = {
        "_raw_saved_input": saved(x),
        "_raw_saved_weight": saved(layer.weight),
        "_raw_saved_running_mean": saved(layer.running_mean),
        "_raw_saved_running_var": saved(layer.running_var),
        "_raw_saved_result1": saved(torch.zeros(x.shape[1])),
        "_raw_saved_result2": saved(torch.ones(x.shape[1])),
        "_saved_training": training,
        "_saved_epsilon": layer.eps,
        "_input_metadata": [Meta(shape=x.shape, dtype=x.dtype, device=torch.device("cuda"))],
        "next_functions": ((None, 0), (Meta(variable=layer.weight), 0), (Meta(variable=layer.bias), 0)),
    }
    if kind.startswith("Cudnn"):
        attributes["_raw_saved_result3"] = saved(torch.zeros(0, dtype=torch.uint8))
    return type(kind, (SimpleNamespace,), {})(**attributes)


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Stand-ins for operations of other backends, which the CPU's does."""
    called: list[str] = []

    def stand_in(name: str) -> Callable[..., Any]:
        def run(x: Tensor, w: Any, b: Any, mean: Any, var: Any, training: bool, factor: float, eps: float) -> Any:
            called.append(name)
            return (*torch.native_batch_norm(x, w, b, mean, var, training, factor, eps), torch.zeros(0))

        return run

    for name in ("cudnn_batch_norm", "miopen_batch_norm"):
        monkeypatch.setattr(torch, name, stand_in(name))
    return called  # type: ignore[return-value]


@pytest.mark.cpu(reason="other backends are played by its kernels")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["CudnnBatchNormBackward0", "MiopenBatchNormBackward0"])
@pytest.mark.parametrize(
    ("layer", "shape", "form"),
    [
        (nn.BatchNorm1d, (4, 3, 5), torch.contiguous_format),
        (nn.BatchNorm2d, (4, 3, 5, 5), torch.contiguous_format),
        (nn.BatchNorm2d, (4, 3, 5, 5), torch.channels_last),
        (nn.BatchNorm3d, (2, 3, 4, 4, 4), torch.channels_last_3d),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_batch_norm_of_another_backend(
    layer: Any, shape: tuple[int, ...], form: Any, kind: str, training: bool, dtype: torch.dtype, backends: list[str]
) -> None:
    """It is run again by the backend that ran it; its running statistics stay."""
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=form)
    norm = layer(3, eps=1e-3).train(training)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    before = norm.running_mean.clone()
    found = operation(fake_batch_norm(kind, x, norm, training))
    assert found is not None
    compute, inputs, *_ = found
    y = compute(*[None if source is None else source.get() for source in inputs])  # type: ignore[union-attr]
    assert backends == ["cudnn_batch_norm" if kind.startswith("Cudnn") else "miopen_batch_norm"]
    assert torch.equal(norm.running_mean, before)
    torch.testing.assert_close(y, norm(x), rtol=0, atol=0)


@pytest.mark.parametrize("attribute", ["_saved_epsilon", "_saved_training", "_raw_saved_input"])
def test_a_batch_norm_of_another_backend_that_lacks_an_attribute(attribute: str) -> None:
    node = fake_batch_norm("CudnnBatchNormBackward0", torch.randn(4, 3), nn.BatchNorm1d(3), training=True)
    delattr(node, attribute)
    assert operation(node) is None


# -- the fused RMS norm, which the CPU makes of other operations


@pytest.mark.parametrize("eps", [1e-6, 1e-5, None])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fused_rms_norm(dtype: torch.dtype, weighted: bool, eps: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its eps is found by the deviations that it saved."""
    monkeypatch.setattr(ops, "_row_norms", {})
    torch.manual_seed(0)
    x = torch.randn(5, 3, 8, dtype=dtype)
    weight = nn.Parameter(torch.randn(8, dtype=dtype)) if weighted else None
    with torch.no_grad():
        y, rstd = torch.ops.aten._fused_rms_norm(x, (8,), weight, eps)
    node = type("FusedRmsNormBackward0", (SimpleNamespace,), {})(
        _raw_saved_input=Meta(data=Handle(x)),
        _raw_saved_weight=Meta(data=None if weight is None else Handle(weight)),
        _raw_saved_result1=Meta(data=Handle(rstd)),
        _saved_normalized_shape=(8,),
        _input_metadata=[Meta(shape=y.shape, dtype=y.dtype, device=y.device)],
        next_functions=((None, 0), (Meta(variable=weight) if weighted else None, 0)),
    )
    for _ in range(2):  # learned, and known
        found = operation(node)
        assert found is not None
        compute, inputs, *_ = found
        assert torch.equal(compute(*[None if source is None else source.get() for source in inputs]), y)  # type: ignore[union-attr]


def test_an_eps_that_the_first_rows_do_not_tell() -> None:
    """Another one fits the first rows as well: the one that fits all is taken."""

    def rows_of(x: Tensor, shape: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor]:
        fine = torch.where(x[:, 0] > 0, 1e-3 + eps, 1e-3)  # rows that tell, and rows that do not
        return x, fine.double() if eps < 1e-6 else fine.double() + eps

    x = torch.cat([-torch.ones(40, 4), torch.ones(8, 4)])
    for eps in (1e-7, 1e-8):
        assert ops._eps_by(rows_of, x, (4,), rows_of(x, (4,), eps)[1]) == eps
