"""Every private name of torch that this package cannot do without: one that is gone is told in words, not by an AttributeError.

Private attributes of graph nodes are read in `revhooks.ops` only, where a node that lacks one is not recomputed; what keeps
dynamo out is looked up in `revhooks.tracing`, and left out where it is missing.
"""

from __future__ import annotations

import torch
import torch._functorch.eager_transforms
import torch.utils._device
import torch.utils.checkpoint

from .errors import explain

__all__ = ["PREDICTING", "REQUIRED", "missing", "require"]

REQUIRED = (
    "torch._C.DisableTorchFunctionSubclass",
    "torch._C._autograd._get_current_graph_task_keep_graph",
    "torch._C._autograd._pop_saved_tensors_default_hooks",
    "torch._C._autograd._push_saved_tensors_default_hooks",
    "torch._C._autograd._top_saved_tensors_default_hooks",
    "torch._C._autograd._unsafe_set_version_counter",
    "torch._C._current_graph_task_id",
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._get_cudnn_allow_tf32",
    "torch._C._get_float32_matmul_precision",
    "torch._C._get_tracing_state",
    "torch._C._is_any_autocast_enabled",
    "torch._C._is_tracing",
    "torch._C._len_torch_function_stack",
    "torch._C._set_cudnn_allow_tf32",
    "torch._C._set_float32_matmul_precision",
    "torch._C._set_grad_enabled",
    "torch._C._set_tracing_state",
    "torch._C._storage_Use_Count",
    "torch._foreach_norm",
    "torch._functorch.eager_transforms",
    "torch._int_mm",
    "torch._mkldnn",
    "torch._neg_view",
    "torch.autograd.Variable._execution_engine.queue_callback",
    "torch.nn.modules.batchnorm._BatchNorm",
    "torch.nn.modules.batchnorm._NormBase",
    "torch.overrides._get_current_function_mode_stack",
    "torch.utils._device.DeviceContext",
    "torch.utils.checkpoint._enable_checkpoint_early_stop",
)
# what only predictions use (`revhooks.hollow`)
PREDICTING = (
    "torch._C._DisableTorchDispatch",
    "torch._C._construct_storage_from_data_pointer",
    "torch._subclasses.fake_tensor.FakeTensorMode",
)


def missing(names: tuple[str, ...] = REQUIRED) -> list[str]:
    """Those that this torch does not have.

    Example:
        >>> missing()
        []
    """
    return [name for name in names if not _exists(name)]


def require(names: tuple[str, ...] = REQUIRED) -> None:
    """Refuse a torch that lacks one.

    Raises:
        ImportError: it does.
    """
    gone = missing(names)
    if gone:
        raise ImportError(
            explain(
                f"torch {torch.__version__}",
                expected="private names that this package uses",
                got=f"none of the name {', '.join(gone)}",
                remedy="use a version of torch from 2.11 to 2.14, or a newer revhooks",
            )
        )


def _exists(name: str) -> bool:
    thing: object = torch
    for part in name.split(".")[1:]:
        if not hasattr(thing, part):
            return False
        thing = getattr(thing, part)
    return True


require()
