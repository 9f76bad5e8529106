"""``revhooks run``: scripts as people write them do what they do without it, and what was saved is told."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import itertools
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import revhooks
from revhooks.cli import run as command
from revhooks.errors import InversionError, ShapeError
from revhooks.nn import AdditiveCoupling
from revhooks.profiler.recorder import Recorder, Samples
from revhooks.profiler.status import StatusLine
from revhooks.profiler.wanted import Wanted, is_named
from revhooks.record import Record, RunStep
from revhooks.runtime.run import Run

pytestmark = pytest.mark.cpu(reason="processes of their own")

ROOT = Path(revhooks.__file__).parent.parent
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("COV")},
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONWARNINGS": "ignore",
}
TIMEOUT = 240


def python(folder: Path, *arguments: str, given: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**ENVIRONMENT, **environment},
        input=given,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def run(folder: Path, *arguments: str, given: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return python(folder, "-m", "revhooks", "run", *arguments, given=given, **environment)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


# ------------------------------------------------------------------ what a script sees

PROBE = '''
"""Doc."""
import atexit, inspect, multiprocessing, os, pickle, sys, threading, time, warnings

print(sys.argv, sys.path[0], __name__, __file__, __spec__ and __spec__.name, __package__, __doc__, type(__loader__).__name__)

class Box:
    x: int = 3

def double(x):
    return 2 * x, __name__

def nap():
    time.sleep(0.2)
    print("a thread that outlives the main function")
    sys.stdout.flush()

if __name__ == "__main__":
    print(sorted(name for name in globals() if name.startswith("__")), type(__builtins__).__name__)
    print(type(pickle.loads(pickle.dumps(Box()))) is Box, sys.modules["__main__"].Box is Box, inspect.getsource(nap))
    print(sys.stdin.read(), open("data.txt").read(), sys.excepthook is sys.__excepthook__)
    sys.stdout.flush()
    for how in ("fork", "spawn") if "spawn" in sys.argv else ("fork",):
        with multiprocessing.get_context(how).Pool(1) as pool:
            print(pool.map(double, [1, 2]))
    sys.stdout.flush()
    if os.fork() == 0:
        sys.exit(0)
    os.wait()
    atexit.register(lambda: print("at exit"))
    warnings.warn("old", DeprecationWarning)
    threading.Thread(target=nap).start()
    sys.exit(3)
'''


@pytest.fixture
def probes(tmp_path: Path) -> Path:
    write(tmp_path / "data.txt", "data")
    for place in ("probe.py", "package/train.py", "package/__main__.py", "folder/__main__.py", "sub/probe.py"):
        write(tmp_path / place, PROBE)
    write(tmp_path / "package/__init__.py", "")
    (tmp_path / "link.py").symlink_to(tmp_path / "sub/probe.py")
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        ["probe.py", "spawn", "-o", "b", "--", "--x", "-m", "--re"],
        pytest.param(["-m", "package.train", "spawn", "--quiet"], marks=pytest.mark.slow),
        pytest.param(["-m", "package"], marks=pytest.mark.slow),
        pytest.param(["folder", "-x"], marks=pytest.mark.slow),
        pytest.param(["link.py"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_script_sees_what_it_sees_without_us(probes: Path, command: list[str]) -> None:
    plain = python(probes, *command, given="typed", PYTHONWARNINGS="default")
    ours = run(probes, "--quiet", *command, given="typed", PYTHONWARNINGS="default")
    assert plain.returncode == ours.returncode == 3, plain.stderr
    assert "a thread" in plain.stdout
    assert "at exit" in plain.stdout
    assert "typed data" in plain.stdout
    assert ours.stdout == plain.stdout
    assert ours.stderr == plain.stderr
    assert "DeprecationWarning: old" in plain.stderr


FAILURES = {
    "chained": """
        def inner():
            try:
                {}["a"]
            except KeyError as error:
                raise ValueError("bad\\nthing") from error
        def outer():
            try:
                inner()
            finally:
                print("finally")
        outer()
        """,
    "hook": """
        import sys, traceback
        def hook(kind, error, trace):
            print("HOOK", kind, error, [frame.name for frame in traceback.extract_tb(trace)], error.__traceback__ is trace)
        sys.excepthook = hook
        def divide():
            1 / 0
        divide()
        """,
    "syntax": "x = = 1",
    "text": "import sys; sys.exit('some text')",
    "at once": "import os; os._exit(7)",
    "terminated": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "import": "import nothing_of_this_name",
    "interrupted": "raise KeyboardInterrupt",
}


@pytest.mark.parametrize(
    "name", [name if name in ("chained", "hook") else pytest.param(name, marks=pytest.mark.slow) for name in FAILURES]
)
def test_a_script_fails_as_without_us(name: str, tmp_path: Path) -> None:
    write(tmp_path / "fails.py", FAILURES[name])
    plain, ours = python(tmp_path, "fails.py"), run(tmp_path, "--quiet", "fails.py")
    assert plain.returncode
    assert ours.returncode == plain.returncode
    assert ours.stdout == plain.stdout
    assert ours.stderr == plain.stderr


@pytest.mark.slow
def test_a_module_fails_as_without_us(tmp_path: Path) -> None:
    write(tmp_path / "package/__init__.py", "")
    write(tmp_path / "package/fails.py", FAILURES["chained"])
    for arguments in (["-m", "package.fails"], ["-m", "nothing_of_this_name"]):
        plain, ours = python(tmp_path, *arguments), run(tmp_path, "--quiet", *arguments)
        assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)
        assert plain.returncode == 1


def test_a_script_that_is_not_there(tmp_path: Path) -> None:
    ours = run(tmp_path, "missing.py")
    assert ours.returncode == 2
    assert "missing.py" in ours.stderr
    assert len(ours.stderr.splitlines()) == 1


def test_help_needs_no_torch() -> None:
    code = """if True:
        import sys
        from revhooks.cli import main
        try:
            main(["run", "--help"])
        except SystemExit as error:
            assert not error.code and "torch" not in sys.modules
        else:
            raise AssertionError
    """
    done = python(ROOT, "-c", code)
    assert done.returncode == 0, done.stderr
    assert "--replay-blocks" in done.stdout


# ------------------------------------------------------------------ training

LOOP = """
import argparse, os, signal, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    def forward(self, x):
        return x + self.inner(x)

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--interrupt", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(256, 64), torch.randint(0, 4, (256,)))
    loader = DataLoader(data, batch_size=64, shuffle=True, num_workers=1)
    model = nn.Sequential(*[Block() for _ in range(4)], nn.LayerNorm(64), nn.Linear(64, 4))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for epoch in range(options.epochs):
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(loss.item().hex(), flush=True)
    if options.interrupt:
        os.kill(os.getpid(), signal.SIGINT)

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def loop(tmp_path: Path) -> Path:
    return write(tmp_path / "train.py", LOOP).parent


def saved(path: Path) -> Record:
    """What was recorded, of which something was saved."""
    record = Record.load(path)
    assert record.kind == "run"
    assert 0 < record.stats.peak_held_bytes < record.stats.packed_bytes
    assert record.stats.held_bytes == sum(one.bytes for one in record.stats.kept)
    assert [step.step for step in record.steps] == sorted({step.step for step in record.steps})
    return record


def test_a_plain_loop(loop: Path) -> None:
    plain = python(loop, "train.py", "--epochs", "2")
    ours = run(loop, "--replay", "train.py:Block", "--replay", "Blok", "-o", "run.json", "train.py", "--epochs", "2")
    assert plain.returncode == ours.returncode == 0, ours.stderr
    assert plain.stdout.splitlines()
    assert ours.stdout == plain.stdout
    record = saved(loop / "run.json")
    assert record.target == "train.py --epochs 2"
    assert record.steps[-1].step == 8
    assert record.stats.replays >= 2 * 8
    assert any(re.fullmatch(r"\d \(Block\)", one.what) for one in record.stats.kept)  # by their paths in the model
    assert "held for backward at most" in ours.stderr
    assert "--replay Blok: no module of such a class was called; repeated blocks are Block" in ours.stderr
    assert "--replay train.py" not in ours.stderr
    again = run(loop, "-o", "run.json", "train.py")
    assert again.returncode
    assert "run.json" in again.stderr
    assert "-f overwrites it" in again.stderr
    assert not again.stdout


def test_the_repeated_blocks_are_found_and_ctrl_c_ends_it(loop: Path) -> None:
    plain = python(loop, "train.py", "--interrupt")
    ours = run(loop, "--replay-blocks", "-o", "run.json", "train.py", "--interrupt")
    assert plain.returncode == ours.returncode == -signal.SIGINT
    assert ours.stdout == plain.stdout
    assert plain.stderr.endswith("KeyboardInterrupt\n")
    assert ours.stderr.startswith(plain.stderr)
    assert "held for backward at most" in ours.stderr
    assert saved(loop / "run.json").stats.replays >= 2 * 4


def test_what_a_device_tells_at_the_end_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    """It comes when the script is over: there is no line of the script to show."""

    class Context:
        def __enter__(self) -> object:
            return Run()

        def __exit__(self, *_: object) -> None:
            raise InversionError("block 3: expected this, got that")

    summary = SimpleNamespace(is_shown=False, replay=Wanted())
    leaving = SimpleNamespace(execute=lambda: SystemExit(0))
    assert command._execute(leaving, Context(), summary) == 1  # type: ignore[arg-type]
    assert capsys.readouterr().err == "revhooks: block 3: expected this, got that\n"

    def fail() -> None:
        raise ShapeError("the script's own")

    with pytest.raises(ShapeError, match="own"):
        command._execute(SimpleNamespace(execute=fail), contextlib.nullcontext(Run()), summary)  # type: ignore[arg-type]


@pytest.mark.slow
def test_options_are_those_of_reversible(loop: Path) -> None:
    for options, is_saved in (
        (["--no-ops"], False),
        (["--budget", "1GiB"], False),
        (["--replay", "Block", "--budget", "0"], True),
    ):
        done = run(loop, *options, "--guard", "raise", "-f", "-o", "run.json", "--quiet", "train.py")
        assert done.returncode == 0
        assert not done.stderr
        stats = Record.load(loop / "run.json").stats
        assert (stats.peak_held_bytes < stats.packed_bytes) == is_saved
    wrong = run(loop, "--budget", "much", "train.py")
    assert wrong.returncode == 2
    assert "budget=" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    assert not wrong.stdout


@pytest.mark.slow
def test_other_ranks_write_files_of_their_own(tmp_path: Path) -> None:
    write(
        tmp_path / "ddp.py",
        """
        import torch, torch.distributed as dist
        from torch import nn
        dist.init_process_group("gloo")
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2))
        net = nn.parallel.DistributedDataParallel(net)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        torch.manual_seed(dist.get_rank())
        for _ in range(4):
            loss = net(torch.randn(16, 4)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if dist.get_rank() == 0:
            print(loss.item().hex())
        dist.destroy_process_group()
        """,
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    plain = python(tmp_path, *launch, "ddp.py")
    ours = python(tmp_path, *launch, "-m", "revhooks", "run", "-o", "run.json", "ddp.py")
    assert plain.returncode == ours.returncode == 0, ours.stderr
    assert plain.stdout.strip()
    assert ours.stdout == plain.stdout
    assert ours.stderr.count("held for backward at most") == 1
    assert saved(tmp_path / "run.json").steps[-1].step == 4
    assert saved(tmp_path / "run.rank1.json").steps[-1].step == 4


TRAINERS = {
    "accelerate": """
        import torch
        from accelerate import Accelerator
        from torch import nn
        from torch.utils.data import DataLoader, TensorDataset
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2))
        data = DataLoader(TensorDataset(torch.randn(64, 16), torch.randint(0, 2, (64,))), batch_size=16)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        model, optimizer, data = accelerator.prepare(model, optimizer, data)
        for _ in range(2):
            for x, y in data:
                with accelerator.accumulate(model):
                    loss = nn.functional.cross_entropy(model(x), y)
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                print(loss.item().hex())
        """,
    "lightning": """
        import logging, torch, lightning
        from torch import nn
        from torch.utils.data import DataLoader, TensorDataset
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        class Net(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2))
            def training_step(self, batch, index):
                loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
                print(loss.item().hex())
                return loss
            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), 1e-2)
        torch.manual_seed(0)
        data = DataLoader(TensorDataset(torch.randn(64, 16), torch.randint(0, 2, (64,))), batch_size=16)
        trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                                    enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(Net(), data)
        """,
    "transformers": """
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_head=2, n_embd=32, vocab_size=50, n_positions=16, use_cache=False))
        data = [{"input_ids": row, "labels": row} for row in torch.randint(0, 50, (32, 16))]
        class Printing(Trainer):
            def training_step(self, *args, **kwargs):
                loss = super().training_step(*args, **kwargs)
                print(loss.item().hex())
                return loss
        arguments = TrainingArguments("out", per_device_train_batch_size=8, num_train_epochs=1, report_to=[], use_cpu=True,
                                      save_strategy="no", disable_tqdm=True, logging_strategy="no", seed=0)
        Printing(model=model, args=arguments, train_dataset=data).train()
        """,
}


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_trainers(trainer: str, tmp_path: Path) -> None:
    for needed in {trainer, "accelerate"} if trainer == "transformers" else {trainer}:
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed}")
    write(tmp_path / "train.py", TRAINERS[trainer])
    options = ["--replay-blocks"] if trainer == "transformers" else []
    plain, ours = python(tmp_path, "train.py"), run(tmp_path, *options, "-o", "run.json", "train.py")
    assert plain.returncode == ours.returncode == 0, ours.stderr
    losses = [line for line in plain.stdout.splitlines() if line.startswith("0x")]
    assert len(losses) >= 4
    assert [line for line in ours.stdout.splitlines() if line.startswith("0x")] == losses
    record = saved(tmp_path / "run.json")
    assert record.steps[-1].step == 4
    assert not options or record.stats.replays


# ------------------------------------------------------------------ the line at the bottom of a terminal


def in_a_terminal(folder: Path, arguments: Sequence[str], *, resize_at: bytes, interrupt_at: bytes) -> tuple[bytes, int]:
    """What a terminal of 80 columns, later of 100, gets, and how the process ended."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execve(sys.executable, [sys.executable, *arguments], {**ENVIRONMENT, "TERM": "xterm"})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    got, end, resized, interrupted = b"", time.monotonic() + TIMEOUT, False, False
    while time.monotonic() < end:
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            got += os.read(terminal, 65536)
        except OSError:
            break
        if resize_at in got and not resized:
            resized = True
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        if interrupt_at in got and not interrupted:
            interrupted = True
            os.write(terminal, b"\x03")
    os.close(terminal)
    return got, os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_the_line_stays_out_of_the_way(tmp_path: Path) -> None:
    write(
        tmp_path / "train.py",
        """
        import time, torch
        from torch import nn
        model = nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Linear(64, 64))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for i in range(1000):
            model(torch.randn(64, 4)).square().mean().backward()
            optimizer.step()
            print(f"\\rbar {i}", end="", flush=True)
            time.sleep(0.05)
        """,
    )
    got, code = in_a_terminal(tmp_path, ["-m", "revhooks", "run", "train.py"], resize_at=b"bar 12", interrupt_at=b"bar 30")
    assert code == -signal.SIGINT
    text = got.decode()
    before, _, after = text.partition("Traceback")
    assert "held for backward at most" in after
    assert "\x1b[1;23r" in before
    assert "\x1b[24;1H" in before
    assert "\x1b[1;29r" in before
    assert "\x1b[30;1H" in before
    lines = re.findall(r"\x1b\[7m( step [^\x1b]*)\x1b\[0m\x1b8", before)
    assert all(
        re.fullmatch(r" step \d+ \| held \S+ KiB \| saved \S+ KiB \| error 0.0e\+00 \| 0 blocks kept", one) for one in lines
    )
    assert "\x1b[r" in before.rpartition("\x1b[7m")[2]  # the terminal is given back before the traceback
    bare = re.sub(r"\x1b7.*?\x1b8|\x1bD\x1b\[1A", "", before)
    assert "\x1b" not in bare
    bars = re.findall(r"\rbar (\d+)", bare)
    assert [int(bar) for bar in bars] == list(range(len(bars)))  # no output was torn
    assert 2 <= len(lines) <= len(bars)


def test_a_line_is_cut_and_given_back() -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 10, 20, 0, 0))
    now = [0.0]
    line = StatusLine(theirs, every=0.5, clock=lambda: now[0])
    assert line.is_due
    line.paint("x" * 50)
    assert not line.is_due
    now[0] = 0.6
    assert line.is_due
    line.paint("y")
    line.close()
    line.close()
    got = ""
    while select.select([ours], [], [], 0.5)[0]:
        got += os.read(ours, 65536).decode()
    assert re.findall("x+", got) == ["x" * 19]
    assert got.count("\x1b[1;9r") == 1
    assert got.endswith("\x1b7\x1b[r\x1b[10;1H\x1b[2K\x1b8")
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 2, 20, 0, 0))
    line.paint("no room")
    line.close()
    assert not select.select([ours], [], [], 0.5)[0]
    os.close(ours)
    os.close(theirs)


def test_no_line_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert StatusLine.on_stderr() is None  # pytest has taken it
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setenv("TERM", "xterm")
    assert StatusLine.on_stderr() is None


# ------------------------------------------------------------------ what is recorded


def test_samples_are_few_and_even() -> None:
    samples = Samples(100)
    for step in range(1, 10_001):
        samples.add(step, lambda step=step: RunStep(step, 0, 0, 0, 0.0))
    steps = [sample.step for sample in samples.kept(RunStep(10_000, 0, 0, 0, 0.0))]
    assert 50 < len(steps) <= 101
    assert steps[0] == 1
    assert steps[-1] == 10_000
    assert len({b - a for a, b in itertools.pairwise(steps[:-1])}) == 1


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 1))


def test_the_optimizer_that_steps_most_counts() -> None:
    model = net()
    often, rarely = (torch.optim.SGD(model.parameters(), 0.0) for _ in range(2))
    seen = []
    with revhooks.reversible() as outer, Recorder(outer, on_step=lambda r: seen.append(r.steps)).recording() as recorder:
        for i in range(9):
            model(torch.ones(2, 4)).sum().backward()
            often.step()
            if i % 3 == 0:
                rarely.step()
    often.step()  # is not recorded any more
    assert recorder.steps == 9
    assert seen == [1, *range(1, 10)]  # the first backward pass came before it was known that an optimizer steps
    record = recorder.record("x")
    assert [step.step for step in record.steps] == list(range(1, 10))
    assert all(a.ns < b.ns for a, b in zip(record.steps[:-1], record.steps[1:], strict=True))
    assert record.steps[-1].packed_bytes == outer.stats.packed_bytes == record.stats.packed_bytes
    assert record.steps[-1].peak_held_bytes == outer.stats.peak_held_bytes


def test_backward_passes_count_where_no_optimizer_steps() -> None:
    model = net()
    with revhooks.reversible() as outer, Recorder(outer).recording() as recorder:
        for _ in range(3):
            model(torch.ones(2, 4)).sum().backward()
    record = recorder.record("x")
    assert [step.step for step in record.steps] == [1, 2, 3]
    assert record.stats.held_bytes == sum(one.bytes for one in record.stats.kept) > 0


@pytest.mark.parametrize("around", ["step", "forward", "loop"])
def test_contexts_of_the_script_are_added_up(around: str) -> None:
    """One a step, around all or around forward, or one for all of them; what is outside of them is the outer one's."""
    model = nn.Sequential(*[AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2), dim=-1) for _ in range(4)])
    first = nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Linear(64, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)

    def train(told: Callable[[Any], object]) -> None:
        context = revhooks.reversible() if around == "loop" else contextlib.nullcontext()
        with context as run:
            told(run)
            for _ in range(40):
                x = first(torch.ones(8, 4))
                with contextlib.nullcontext() if around == "loop" else revhooks.reversible() as run:
                    told(run)
                    y = model(x)
                    if around == "step":
                        y.square().mean().backward()
                if around != "step":
                    y.square().mean().backward()
                del run, x, y
                optimizer.step()

    runs: list[Any] = []
    with revhooks.reversible():
        train(runs.append)  # which holds them
    expected = [run.stats for run in runs if run is not None]
    with revhooks.reversible() as outer, Recorder(outer).recording() as recorder:
        train(lambda _: None)
    stats, own = recorder.record("x").stats, outer.stats
    assert stats.frames == sum(one.frames for one in expected) == 40 * 4
    assert stats.inversions == sum(one.inversions for one in expected) > 2 * 40
    assert stats.packed_bytes == own.packed_bytes + max(one.packed_bytes for one in expected)
    assert stats.peak_held_bytes == own.peak_held_bytes + max(one.peak_held_bytes for one in expected)
    assert stats.worst_error == max(one.worst_error for one in expected)


def test_names_of_classes() -> None:
    class Special(nn.TransformerEncoderLayer):
        pass

    layer = Special(8, 2, 16)
    for name in (
        "Special", "TransformerEncoderLayer", "torch.nn:TransformerEncoderLayer", "torch.nn.TransformerEncoderLayer",
        "torch.nn.modules.transformer:TransformerEncoderLayer", f"{__name__}:test_names_of_classes.<locals>.Special",
    ):  # fmt: skip
        wanted = Wanted([name])
        assert wanted.means(layer), name
        assert not wanted.unmatched
        assert not wanted.means(nn.Linear(1, 1))
    for name in ("Other", "torch.nn:Special", "nowhere:Special", ":Special"):
        assert not is_named(Special, name)


def test_the_repeated_blocks_of_what_is_called() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    class Other(Block):
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block() for _ in range(3)])
            self.others = nn.ModuleList([Other() for _ in range(2)])
            self.couplings = nn.ModuleList([AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(9)])

    wanted = Wanted(blocks=True)
    models = [Model(), Model()]
    for model in models:
        assert not wanted.means(model)
        assert all(wanted.means(block) for block in [*model.blocks, *model.others])
        assert not any(wanted.means(one) for one in model.couplings)  # they invert
        assert not any(wanted.means(block.inner) for block in model.blocks)
    assert wanted.taken == {"Block": 6, "Other": 4}
    alone = Block()
    assert not wanted.means(alone)


def test_recording_costs_next_to_nothing() -> None:
    """A step of nothing but an optimizer without parameters to step: what is left is the hook."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.0)

    def took() -> float:
        begin = time.perf_counter()
        for _ in range(1000):
            optimizer.step()
        return (time.perf_counter() - begin) / 1000

    with revhooks.reversible() as outer:
        took()
        pairs = []
        for _ in range(5):
            without = took()
            with Recorder(outer).recording():
                pairs.append(took() - without)
    assert sorted(pairs)[2] < 50e-6


def test_steps_of_a_compiled_optimizer() -> None:
    """Dynamo is not to look at what is recorded, nor to warn of it."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    step = torch.compile(optimizer.step, backend="eager")
    with revhooks.reversible() as outer, Recorder(outer).recording() as recorder:
        for _ in range(3):
            model(torch.ones(2, 4)).sum().backward()
            step()
    assert recorder.steps == 3


def test_a_record_reads_back(tmp_path: Path) -> None:
    model = net()
    with revhooks.reversible() as outer, Recorder(outer).recording() as recorder:
        model(torch.ones(2, 4)).sum().backward()
    record = recorder.record("train.py --epochs 3")
    record.save(tmp_path / "run.json")
    assert Record.load(tmp_path / "run.json") == record
    assert json.loads((tmp_path / "run.json").read_text())["kind"] == "run"
