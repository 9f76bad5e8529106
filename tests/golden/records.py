"""Records of steps as they might have been measured: what reports are tested on."""

from __future__ import annotations

import math

from revhooks.record import (
    CATEGORIES,
    Choice,
    Fit,
    Kept,
    ModuleRow,
    Record,
    RunStep,
    Slice,
    Stats,
    Timeline,
    WorstError,
)

KIB, MIB, GIB = 2**10, 2**20, 2**30
ORDINARY = "saved outside any registered block"
AROUND = "reversible(replay=...) of the module around it, checkpoint(), an invertible block, or offload=True on CUDA"
ANCHOR = "anchor: what was before it is rebuilt from it"
FEWER = "nothing: a chain needs one; fewer ordinary layers between its blocks make fewer chains"
NEWEST = "newest block: kept until the next one opens"
RECONSTRUCTED = "reconstructed by inversion"
SHARED = "shared with its neighbours"


def course(held: int, peak: int, temporary: int, *, parameters: int = 0, samples: int = 60, ns: int = 40_000_000) -> Timeline:
    """Memory that grows in forward and goes in backward, while blocks are rebuilt one after the other; a head makes the peak."""
    half = samples // 2
    up = [min(1.0, i / half) for i in range(samples)]
    down = [1.0 if i <= half else (samples - i) / half for i in range(samples)]
    waves = [0.0 if i <= half else 0.5 + 0.5 * math.cos(math.pi * (i - half - 1) / 3) for i in range(samples)]
    rebuilt = (peak - held - temporary) // 2
    series = {
        "held": [held * a * b for a, b in zip(up, down, strict=True)],
        "rebuilt": [rebuilt * wave * (half < i < samples - 3) for i, wave in enumerate(waves)],
        "temporary": [temporary * (0.6 + 0.4 * math.sin(i)) * (0 < i < samples - 1) for i in range(samples)],
        "gradients": [parameters * (0 if i <= half else (i - half) / half) for i in range(samples)],
        "parameters": [parameters for _ in range(samples)],
        "optimizer": [2 * parameters for _ in range(samples)],
    }
    series["temporary"][half] = peak - held
    times = tuple(i * ns // samples for i in range(samples))
    return Timeline(
        times,
        {name: tuple(int(value) for value in series[name]) for name in CATEGORIES if any(series[name])},
        (("forward", 0), ("backward", times[half])),
    )


def choice(
    name: str, saved: float, peak: float, permille: int, error: float = 0.0, gradient: float | None = 0.0, **more: object
) -> Choice:
    """A way that saves and peaks at so many MiB."""
    step = 80_000_000 * permille // 1000
    return Choice(
        name=name,
        code="" if name == "plain" else f"revhooks.{name}" if name.startswith("rev") else f"revhooks.reversible({name})",
        saved_bytes=int(saved * MIB),
        accounted_peak_bytes=int(peak * MIB),
        step_ns=step,
        time_permille=permille,
        reconstruction_error=error,
        worst_block="h.3 (GPT2Block)" if error else "",
        gradient_error=gradient,
        timeline=course(int(saved * MIB), int(peak * MIB), 3 * MIB, ns=step),
        **more,  # type: ignore[arg-type]
    )


def gpt_modules() -> tuple[ModuleRow, ...]:
    """A GPT of four layers: 30 rows and more, as a profiler gives them."""
    rows = [ModuleRow("", "GPT2LMHeadModel", 9 * MIB, 9 * MIB, ORDINARY, AROUND, 1)]
    rows.append(ModuleRow("transformer.wte", "Embedding", 8 * KIB, 8 * KIB, ORDINARY, AROUND, 1))
    for layer in range(4):
        at = f"transformer.h.{layer}"
        rows += [
            ModuleRow(f"{at}.ln_1", "LayerNorm", 2 * MIB, 0, SHARED, "", 1),
            ModuleRow(f"{at}.attn", "GPT2Attention", 3 * MIB, 3 * MIB, ORDINARY, AROUND, 1),
            ModuleRow(f"{at}.attn.c_attn", "Conv1D", 2 * MIB, 2 * MIB, ORDINARY, AROUND, 1),
            ModuleRow(f"{at}.attn.c_proj", "Conv1D", 2 * MIB, 0, SHARED, "", 1),
            ModuleRow(f"{at}.attn.resid_dropout", "Dropout", 512 * KIB, 512 * KIB, ORDINARY, AROUND, 1),
            ModuleRow(f"{at}.ln_2", "LayerNorm", 2 * MIB, 0, SHARED, "", 1),
            ModuleRow(f"{at}.mlp.c_fc", "Conv1D", 2 * MIB, 2 * MIB, ORDINARY, AROUND, 1),
            ModuleRow(f"{at}.mlp.act", "NewGELUActivation", 6 * MIB, 5 * MIB, ORDINARY, AROUND, 1),
            ModuleRow(f"{at}.mlp.c_proj", "Conv1D", 6 * MIB, 0, SHARED, "", 1),
        ]
    rows += [
        ModuleRow("transformer.ln_f", "LayerNorm", 2 * MIB, 2 * MIB, ORDINARY, AROUND, 1),
        ModuleRow("lm_head", "Linear", 0, 0, SHARED, "", 1),
    ]
    return tuple(rows)


def gpt(*, measured: bool = True) -> Record:
    """Four layers of GPT-2, with every choice measured."""
    figures = [
        ("plain", 115.0, 131.2, 1000, 0.0, None, 140),
        ("reversible()", 61.0, 96.0, 1100, 0.0, 2.3e-7, 104),
        ("replay=GPT2Block", 12.0, 38.0, 1310, 0.0, 3.1e-7, 47),
        ("budget=50%", 30.5, 66.0, 1190, 0.0, 2.3e-7, 74),
        ("budget=25%", 15.3, 50.2, 1260, 0.0, 2.3e-7, 59),
        ("checkpoint GPT2Block", 13.0, 46.5, 1345, 0.0, 0.0, 55),
    ]
    how = "resident set, fresh process"
    more = [{"measured_peak_bytes": peak * MIB, "how": how} if measured else {} for *_, peak in figures]
    choices = tuple(choice(*line[:-1], **extra) for line, extra in zip(figures, more, strict=True))
    return Record(
        "report",
        "bench/gpt.py:four_layers",
        "AMD EPYC, 2 threads",
        "2.13.0",
        choices,
        Stats(packed_bytes=115 * MIB, held_bytes=61 * MIB, peak_held_bytes=61 * MIB),
        gpt_modules(),
        parameter_bytes=27 * MIB,
        gradient_bytes=27 * MIB,
        optimizer_bytes=54 * MIB,
        optimizer="AdamW",
    )


def revnet() -> Record:
    """A chain of couplings: nothing that was tried is better than reversible()."""
    rows = [
        ModuleRow("stem", "Conv2d", 2 * MIB, 2 * MIB, ORDINARY, AROUND, 1),
        *(ModuleRow(f"body.{i}", "AdditiveCoupling", 6 * MIB, 0, RECONSTRUCTED, "", 1, 1, 2_000_000, 3e-7) for i in range(11)),
        ModuleRow("body.11", "AdditiveCoupling", 6 * MIB, 2 * MIB, ANCHOR, FEWER, 1, 1, 2_000_000, 1e-7),
        ModuleRow("head", "Linear", 64 * KIB, 64 * KIB, ORDINARY, AROUND, 1),
    ]
    choices = (
        choice("plain", 74.1, 80.0, 1000, 0.0, None),
        choice("reversible()", 4.1, 14.0, 1320, 3.2e-7, 6.4e-7),
        choice("replay=AdditiveCoupling", 28.0, 38.0, 1310, 0.0, 4.0e-7),
        choice("checkpoint AdditiveCoupling", 26.0, 36.0, 1335, 0.0, 0.0),
    )
    stats = Stats(74 * MIB, 4 * MIB, 8 * MIB, 12, 12, 0, 0, 0, 0, WorstError(3.2e-7, "body.0 (AdditiveCoupling)"))
    return Record("report", "examples/revnet_digits.py:target", "cpu", "2.13.0", choices, stats, tuple(rows))


def failing() -> Record:
    """A choice that could not be measured, and long names."""
    choices = (
        choice("plain", 5.0, 8.0, 1000, 0.0, None, measured_peak_bytes=9 * MIB, how="cuda allocator"),
        choice("reversible()", 5.0, 8.0, 1020, 0.0, 0.0, measured_peak_bytes=9 * MIB, how="cuda allocator"),
        Choice(
            "replay=MyVeryLongTransformerEncoderLayerWithAdapters",
            problem="ReplayError: replay of layers.0 (MyVeryLongTransformerEncoderLayerWithAdapters): expected what forward "
            "saved, got [3 tensors] more. Remedy: make it do the same in every call.",
        ),
        choice("budget=10%", 4.9, 7.9, 1050, 0.0, None, measured_peak_bytes=8 * MIB, how="cuda allocator"),
    )
    path = "encoder.very_long_name_of_a_module.layers[odd].{}.feed_forward_network.projection"
    rows = tuple(ModuleRow(path.format(i), "ParallelGatedLinearUnit", MIB, MIB, ORDINARY, AROUND) for i in (0, 1, 2, 5))
    rows += (ModuleRow("", "Net", MIB, MIB),)
    return Record("report", "train.py:step[0]", "NVIDIA H200", "2.13.0", choices, Stats(), rows)


def run() -> Record:
    """A script of 1,200 steps."""
    kept = (
        Kept(ANCHOR, "body.11 (AdditiveCoupling)", 2 * MIB, "", FEWER),
        *(Kept(ORDINARY, f"blocks.{i}.norm", 512 * KIB, "NativeLayerNorm", AROUND) for i in range(4)),
        Kept(NEWEST, "body.11 (AdditiveCoupling)", 640, "", "nothing: it goes when the next block opens"),
    )
    stats = Stats(74 * MIB, 0, 9 * MIB, 14_400, 14_399, 1, 0, 0, 0, WorstError(4.1e-6, "body.0 (AdditiveCoupling)"), kept)
    steps = tuple(RunStep(n, n * 25_000_000, 74 * MIB, 9 * MIB, 4.1e-6 * n / 1200) for n in (1, 300, 600, 900, 1200))
    return Record("run", "train.py --epochs 3", "cpu", "2.13.0", (), stats, steps=steps)


def profile() -> Record:
    """Two steps with an optimizer."""
    whole = course(4 * MIB, 13 * MIB, 3 * MIB, parameters=10 * MIB)
    step = Timeline(whole.ns, whole.bytes, (*whole.phases, ("optimizer", whole.ns[-6])))
    slices = [
        Slice("step", "forward", 0, 18_000_000),
        *(Slice(f"body.{i}", "forward", i * 4_000_000, i * 4_000_000 + 3_900_000) for i in range(4)),
        Slice("body.0.f", "forward", 100_000, 2_000_000),
        Slice("backward", "backward", 20_000_000, 36_000_000),
        *(Slice(f"body.{3 - i}", "rebuild", 20_000_000 + i * 4_000_000, 22_000_000 + i * 4_000_000) for i in range(4)),
        Slice("optimizer", "optimizer", 36_000_000, 39_000_000),
    ]
    rebuilt = (2, 2, 4_000_000)
    rows = (
        ModuleRow("stem", "Conv2d", 4 * MIB, 4 * MIB, ORDINARY, AROUND, 2),
        *(ModuleRow(f"body.{i}", "AdditiveCoupling", 12 * MIB, 0, RECONSTRUCTED, "", *rebuilt, 3e-7 * (4 - i)) for i in range(4)),
        ModuleRow("pool", "AdaptiveAvgPool2d", 0, 0, SHARED, "", 2),
        ModuleRow("", "RevNet", 128 * KIB, 128 * KIB, ORDINARY, AROUND, 2),
    )
    profiled = Choice("profiled", "", 0, 13 * MIB, 16 * MIB, "cuda allocator", timeline=step)
    stats = Stats(52 * MIB, 4 * MIB, 5 * MIB, 8, 8, 0, 2, 0, 0, WorstError(1.2e-6, "body.0 (AdditiveCoupling)"))
    return Record(
        "profile", "RevNet", "NVIDIA H200", "2.13.0", (profiled,), stats, rows, tuple(slices), (),
        10 * MIB, 10 * MIB, 20 * MIB, "AdamW",
    )  # fmt: skip


def prediction() -> Record:
    """A GPT that no machine at hand has room for."""

    def predicted(name: str, saved: float, peak: float) -> Choice:
        step = course(int(saved * GIB), int(peak * GIB), GIB)
        return Choice(name, saved_bytes=int(saved * GIB), accounted_peak_bytes=int(peak * GIB), how="predicted", timeline=step)

    choices = (
        predicted("plain", 61.2, 66.0),
        predicted("reversible()", 38.0, 44.1),
        predicted("replay=GPT2Block", 4.4, 9.6),
        predicted("checkpoint GPT2Block", 4.5, 12.1),
    )
    fits = (
        Fit("plain", "batch", 80 * GIB, 8, 77 * GIB),
        Fit("checkpoint GPT2Block", "batch", 80 * GIB, 44, 79 * GIB),
        Fit("reversible()", "batch", 80 * GIB, 13, 78 * GIB),
        Fit("replay=GPT2Block", "batch", 80 * GIB, 56, int(79.6 * GIB)),
    )
    return Record(
        "prediction", "models.py:gpt2_xl", "cuda (fake tensors)", "2.13.0", choices,
        parameter_bytes=6 * GIB, gradient_bytes=6 * GIB, optimizer_bytes=12 * GIB, optimizer="AdamW", fits=fits,
    )  # fmt: skip


RECORDS = {
    "gpt": gpt,
    "gpt_accounted": lambda: gpt(measured=False),
    "revnet": revnet,
    "failing": failing,
    "run": run,
    "profile": profile,
    "prediction": prediction,
}
