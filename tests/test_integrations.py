"""Trainers of others, with and without the callback: the same weights, less memory, figures in their logs."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revhooks
from revhooks.registry import ACTIVE
from tests.conftest import mlp

pytestmark = [
    pytest.mark.cpu(reason="trainers that look for devices themselves"),
    pytest.mark.filterwarnings("default"),  # theirs
]

NAMES = ("revhooks/saved_bytes", "revhooks/peak_held_bytes", "revhooks/worst_error")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(8), mlp(8), nn.GELU(), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class Net(nn.Module):
    """Ordinary blocks; in the form that Hugging Face's Trainer calls. It may raise in a call."""

    def __init__(self, fails_at: int = -1, error: type[BaseException] = ValueError) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), *[Block() for _ in range(4)], nn.Linear(8, 1))
        self.fails_at = fails_at
        self.error = error
        self.contexts: list[bool] = []  # whether each call lay in one

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.contexts.append(ACTIVE.run is not None)
        if len(self.contexts) == self.fails_at:
            raise self.error("as wished")
        out = self.body(x).squeeze(-1)
        return {"loss": (out - labels).square().mean(), "logits": out}


def examples(count: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(4, generator=generator), "labels": torch.randn((), generator=generator)} for _ in range(count)]


def is_closed() -> bool:
    """Whether no context is open: nothing of ours is active, and saved tensors are what they are."""
    x = torch.ones(2, requires_grad=True)
    y = x.exp()
    plain = y.grad_fn._saved_result.data_ptr() == y.data_ptr()  # type: ignore[union-attr]
    return ACTIVE.run is None and plain and torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_a_context_that_is_open_is_seen() -> None:
    assert is_closed()
    with revhooks.reversible():
        assert not is_closed()
    assert is_closed()


# -- Lightning


@pytest.fixture(scope="module")
def lightning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("lightning.pytorch")


def module_of(lightning: Any, manual: bool = False, **options: Any) -> Any:
    class Lit(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = Net(**options)
            self.automatic_optimization = not manual
            self.seen: list[dict[str, float]] = []

        def training_step(self, batch: dict[str, Tensor], index: int) -> Any:
            loss = self.net(**batch)["loss"]
            if manual:
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                self.manual_backward(loss)
                for optimizer in self.optimizers():
                    optimizer.step()
            return loss

        def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
            self.log("val", self.net(**batch)["loss"])

        def on_train_batch_end(self, *args: Any) -> None:
            self.seen.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})

        def configure_optimizers(self) -> Any:
            half = list(self.parameters())[:6], list(self.parameters())[6:]
            if manual:
                return [torch.optim.SGD(half[0], lr=0.1), torch.optim.Adam(half[1], lr=0.01)]
            return torch.optim.Adam(self.parameters(), lr=0.01)

    return Lit()


def fit(lightning: Any, root: Path, callbacks: list[Any], module: Any, **options: Any) -> Any:
    data = torch.utils.data.DataLoader(examples(), batch_size=2)  # type: ignore[arg-type]
    options = {"logger": False, **options}
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, default_root_dir=root, log_every_n_steps=2, **options,
    )  # fmt: skip
    torch.manual_seed(5)
    trainer.fit(module, data, data)
    return module


LIGHTNING: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 3},
    "validated in between": {"val_check_interval": 2},
    "mixed precision": {"precision": "bf16-mixed"},
    "clipped": {"gradient_clip_val": 0.5},
    "several optimizers": {"manual": True},
}


@pytest.mark.parametrize("name", LIGHTNING)
def test_lightning(name: str, lightning: Any, tmp_path: Path) -> None:
    from revhooks.integrations.lightning import ReversibleCallback

    options = dict(LIGHTNING[name])
    manual = options.pop("manual", False)
    plain = fit(lightning, tmp_path, [], module_of(lightning, manual), **options)
    rev = fit(lightning, tmp_path, [ReversibleCallback(replay=Block)], module_of(lightning, manual), **options)
    assert same(plain, rev)
    assert is_closed()
    assert any(rev.net.contexts)
    assert not all(rev.net.contexts)  # validation lies outside
    assert not any(plain.net.contexts)
    figures = rev.trainer.callback_metrics
    assert all(name in figures for name in NAMES)
    assert figures["revhooks/saved_bytes"] > 0
    assert figures["revhooks/peak_held_bytes"] > 0


def test_the_logger_of_lightning_gets_the_figures(lightning: Any, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    from revhooks.integrations.lightning import ReversibleCallback

    logger = CSVLogger(tmp_path)
    fit(lightning, tmp_path, [ReversibleCallback()], module_of(lightning), logger=logger)
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index(NAMES[0])
    assert any(float(row.split(",")[column] or 0) > 0 for row in rows[1:])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_lightning_leaves_nothing_open(error: type[BaseException], lightning: Any, tmp_path: Path) -> None:
    from revhooks.integrations.lightning import ReversibleCallback

    callback = ReversibleCallback()
    with pytest.raises((error, SystemExit)):  # which Lightning makes of an interrupt
        fit(lightning, tmp_path, [callback], module_of(lightning, fails_at=4, error=error), num_sanity_val_steps=0)
    assert is_closed()
    fit(lightning, tmp_path, [callback], module_of(lightning))
    assert is_closed()


def test_a_batch_that_lightning_skips(lightning: Any, tmp_path: Path) -> None:
    from revhooks.integrations.lightning import ReversibleCallback

    module = module_of(lightning)
    module.on_train_batch_start = lambda batch, index: -1 if index == 2 else None
    fit(lightning, tmp_path, [ReversibleCallback()], module)
    assert is_closed()


# -- Hugging Face


@pytest.fixture(scope="module")
def transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("accelerate")
        return pytest.importorskip("transformers")


def trained(transformers: Any, root: Path, callbacks: list[Any], net: nn.Module | None = None, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(root), per_device_train_batch_size=2, num_train_epochs=2, use_cpu=True, report_to=[], logging_steps=2,
        save_strategy="no", disable_tqdm=True, seed=3, remove_unused_columns=False, **options,
    )  # fmt: skip
    if net is None:
        torch.manual_seed(0)
        net = Net()
    trainer = transformers.Trainer(
        model=net, args=arguments, train_dataset=examples(), eval_dataset=examples(4), callbacks=callbacks
    )
    return trainer


HUGGING: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 3},
    "evaluated in between": {"eval_strategy": "steps", "eval_steps": 2},
    "mixed precision": {"bf16": True},
}


@pytest.mark.parametrize("name", HUGGING)
def test_hugging_face(name: str, transformers: Any, tmp_path: Path) -> None:
    from revhooks.integrations.transformers import ReversibleCallback

    plain = trained(transformers, tmp_path, [], **HUGGING[name])
    plain.train()
    rev = trained(transformers, tmp_path, [ReversibleCallback(replay=Block)], **HUGGING[name])
    rev.train()
    assert same(plain.model, rev.model)
    assert is_closed()
    assert any(rev.model.contexts)
    assert all(rev.model.contexts) == ("eval_strategy" not in HUGGING[name])
    logged = [entry for entry in rev.state.log_history if "loss" in entry]
    assert logged
    assert all(name in entry for entry in logged for name in NAMES)
    assert logged[-1]["revhooks/saved_bytes"] > 0
    assert not rev.model._forward_hooks
    assert not rev.model._forward_pre_hooks


def test_other_loggers_get_the_figures(transformers: Any, tmp_path: Path) -> None:
    from revhooks.integrations.transformers import ReversibleCallback

    seen = []

    class Logger(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            seen.append(dict(logs))

    callback = ReversibleCallback()
    trainer = trained(transformers, tmp_path, [Logger(), callback])
    assert callback.attach(trainer) is callback
    trainer.train()
    assert NAMES[0] in seen[0]
    assert trainer.callback_handler.callbacks.count(callback) == 1


def test_an_exception_in_hugging_face_leaves_nothing_open(transformers: Any, tmp_path: Path) -> None:
    from revhooks.integrations.transformers import ReversibleCallback

    callback = ReversibleCallback()
    trainer = trained(transformers, tmp_path, [callback], Net(fails_at=3))
    with pytest.raises(ValueError, match="as wished"):
        trainer.train()
    assert is_closed()
    callback.detach()
    assert not trainer.model._forward_hooks
    trained(transformers, tmp_path, [callback]).train()
    assert is_closed()


def test_an_interrupt_in_hugging_face(transformers: Any, tmp_path: Path) -> None:
    from revhooks.integrations.transformers import ReversibleCallback

    callback = ReversibleCallback()
    with pytest.raises(KeyboardInterrupt):
        trained(transformers, tmp_path, [callback], Net(fails_at=3, error=KeyboardInterrupt)).train()
    callback.detach()
    assert is_closed()


# -- Accelerate


def test_accelerate(transformers: Any) -> None:
    """The one line of the documentation, with accumulation."""
    accelerate = pytest.importorskip("accelerate")
    nets, saved = [], 0
    for reverse in (False, True):
        torch.manual_seed(0)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        net = Net()
        data = torch.utils.data.DataLoader(examples(), batch_size=2)  # type: ignore[arg-type]
        model, optimizer, loader = accelerator.prepare(net, torch.optim.Adam(net.parameters(), lr=0.01), data)
        for batch in loader:
            with accelerator.accumulate(model), revhooks.reversible(replay=Block) if reverse else torch.enable_grad() as run:
                accelerator.backward(model(**batch)["loss"])
                optimizer.step()
                optimizer.zero_grad()
        saved = run.stats.packed_bytes - run.stats.peak_held_bytes if reverse else 0
        nets.append(net)
    assert same(*nets)
    assert saved > 0
    assert is_closed()


def test_nothing_is_imported_that_is_not_asked_for() -> None:
    import subprocess

    code = "import sys, revhooks.integrations; assert not {'lightning', 'transformers', 'accelerate'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
