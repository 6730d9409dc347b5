"""Two ways of computing the same, interleaved in one process: ratio with spread, peak memory, and a dated report."""

from __future__ import annotations

import gc
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from letit_dist.evaluation.tables import markdown
from letit_dist.files import require_folder
from letit_dist.memory import peak_bytes, resident_bytes, resident_peak_of, return_freed_memory

Clock = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Side:
    """One way: `run` does the work once."""

    run: Callable[[], object]
    # What lives between two runs, such as weights and the optimiser's state: it counts as memory of this side.
    held: Callable[[], Iterable[Tensor]] = tuple
    # Drops what the next run makes anew, such as gradients, so that it is counted once.
    forget: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Match:
    """A naive formulation against ours. `agree` says how closely their results agree, or raises UserError."""

    name: str
    naive: Side
    ours: Side
    agree: Callable[[], str]
    images: int | None = None  # that a run takes: the table then has images a second
    target: float | None = None  # of naive / ours
    memory: Callable[[Side, torch.device | str], int | None] | None = None  # None: all tensors
    seconds: Clock | None = None  # None: the time that passes


@dataclass(frozen=True)
class Result:
    """One row of the table. `seconds` are those of (naive, ours) in each pair; memory in bytes, None = not seen."""

    name: str
    seconds: tuple[tuple[float, float], ...]
    memory: tuple[int, int] | None
    agreement: str
    images: int | None = None
    target: float | None = None
    operations: int | None = None  # of a run of ours, in floating point
    peak: float | None = None  # operations a second that this device can do

    @property
    def ratios(self) -> list[float]:
        """Naive over ours in each pair: above 1, ours is faster."""
        return [naive / ours for naive, ours in self.seconds]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Of the ratios; the second is the median."""
        return quartiles(self.ratios)

    def row(self) -> dict[str, object]:
        """Column -> what it shows."""
        low, middle, high = self.quartiles
        medians = zip(("naive", "ours"), map(statistics.median, zip(*self.seconds, strict=True)), strict=True)
        if self.images is None:
            speeds = {f"{side}, s": f"{seconds:.3g}" for side, seconds in medians}
        else:
            speeds = {f"{side}, images/s": f"{self.images / seconds:.3g}" for side, seconds in medians}
        return {
            "case": self.name,
            **speeds,
            "naive / ours": f"{middle:.2f} ({low:.2f} to {high:.2f})",
            **({"target": self.target and f"at least {self.target:g}"} if self.target else {}),
            "pairs": len(self.seconds),
            "naive, MiB": self.memory and f"{self.memory[0] / 2**20:.1f}",
            "ours, MiB": self.memory and f"{self.memory[1] / 2**20:.1f}",
            **self._utilisation(),
            "agreement": self.agreement,
        }

    def _utilisation(self) -> dict[str, str | None]:
        if self.operations is None:
            return {}
        rate = self.operations / statistics.median(ours for _, ours in self.seconds)
        each = f"GFLOP an {'image' if self.images else 'iteration'}"
        if self.operations == 0:  # all of it in numba's kernels
            return {each: None, "ours, GFLOP/s": None, "of the peak": None}
        return {
            each: f"{self.operations / (self.images or 1) / 1e9:.3g}",
            "ours, GFLOP/s": f"{rate / 1e9:.3g}",
            "of the peak": f"{rate / self.peak:.1%}" if self.peak else None,
        }


@dataclass(frozen=True)
class Row:
    """One row of a table of its own columns, where more than two ways are compared."""

    columns: dict[str, object]
    operations: None = None

    def row(self) -> dict[str, object]:
        """Column -> what it shows."""
        return self.columns


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile, interpolated between the values."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def clock(device: torch.device | str) -> Clock:
    """Seconds that a function takes: events on a GPU, whose work is only queued when a function returns."""
    if torch.device(device).type != "cuda":
        return _on_host

    def on_gpu(function: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record(torch.cuda.current_stream(device))
        function()
        end.record(torch.cuda.current_stream(device))
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000

    return on_gpu


def _on_host(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def core_seconds(function: Callable[[], object]) -> float:
    """Seconds of one core that a function keeps this process busy, whatever else runs on the machine."""
    start = time.process_time()
    function()
    return time.process_time() - start


def interleave(
    naive: Callable[[], object], ours: Callable[[], object], *, repeats: int, warmup: int, seconds: Clock
) -> tuple[tuple[float, float], ...]:
    """Seconds of (naive, ours), in turns: what disturbs the machine for longer than a pair disturbs both alike."""
    for _ in range(warmup):
        naive()
        ours()
    collecting = gc.isenabled()
    gc.disable()  # a collection would land in whichever side is running
    try:
        pairs = []
        for _ in range(repeats):
            gc.collect()
            pairs.append((seconds(naive), seconds(ours)))
    finally:
        if collecting:
            gc.enable()
    return tuple(pairs)


def memory(side: Side, device: torch.device | str) -> int:
    """Bytes at the peak of a run: what the side holds, and what the run adds."""
    side.forget()
    gc.collect()
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in side.held()}
    return sum(held.values()) + peak_bytes(side.run, device)


def resident_peak(side: Side, device: torch.device | str = "cpu") -> int | None:
    """Bytes by which the memory of a process grows at the most in a run: what other libraries hold counts too.

    Taken in a fork, which gives back first what was freed before. None where the system does not tell.
    """
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_report_peak, args=(side, send))
    child.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        return None
    finally:
        child.join()


def _report_peak(side: Side, send: Connection) -> None:
    return_freed_memory()
    before = resident_bytes()
    try:
        peak = resident_peak_of(side.run)
    except OSError:
        peak = None
    send.send(None if peak is None else max(0, peak - before))


# Dense bfloat16 products, operations a second, by what the device's name holds (NVIDIA's data sheets, SXM modules).
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def peak_rate(device: torch.device | str) -> float | None:
    """What the device can do in bfloat16; None where that is not known."""
    if torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAKS.items() if part in name), None)


class _Operations(TorchDispatchMode):
    """Counts by torch's formulas. Its own FlopCounterMode does so by module too, with hooks that R1 breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **kwargs, out_val=result)
        return result


def operations(run: Callable[[], object]) -> int:
    """Multiplications and additions of the convolutions and matrix products of a run, not compiled."""
    with torch.compiler.set_stance("force_eager"), _Operations() as counter:
        run()
    return counter.total


def measure(
    match: Match,
    *,
    device: torch.device | str,
    repeats: int,
    warmup: int = 1,
    with_memory: bool = True,
    with_operations: bool = False,
) -> Result:
    """Check that both sides agree, then time them in turns, then take their memory and count operations."""
    agreement = match.agree()
    pairs = interleave(
        match.naive.run, match.ours.run, repeats=repeats, warmup=warmup, seconds=match.seconds or clock(device)
    )
    # After the timing: by now everything lives that is made once, such as the optimisers' state.
    taken = match.memory or memory
    naive, ours = (taken(match.naive, device), taken(match.ours, device)) if with_memory else (None, None)
    known = None if naive is None or ours is None else (naive, ours)
    counted = operations(match.ours.run) if with_operations else None
    return Result(match.name, pairs, known, agreement, match.images, match.target, counted, peak_rate(device))


# ---------------------------------------------------------------- the report


def machine(device: torch.device | str) -> str:
    """Where this runs, in words: the GPU, or the processor with its cores; and torch's threads."""
    threads = f"{torch.get_num_threads()} torch thread{'s' * (torch.get_num_threads() != 1)}"
    cores = f"{processor()}, {os.cpu_count()} cores, {threads}"
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda} ({cores})"
    return cores


def processor() -> str:
    """The model of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


LEGEND = """\
Seconds, or images a second, are medians. naive / ours: median of the ratios of each pair (quartiles); above 1, ours is
faster. MiB: all tensors that live at once at the peak, weights and optimiser state included; on a CPU without the
workspaces that operations borrow, and without what numba's kernels take. Agreement: the largest differences, found
before anything was timed.
"""
_OPERATIONS = """\
GFLOP: multiplications and additions of the convolutions and matrix products of ours (torch.utils.flop_counter, from
which numba's kernels are hidden). Of the peak: model FLOP utilisation, the share of what the device does in dense
bfloat16 products by its data sheet.
"""


@dataclass(frozen=True)
class Fact:
    """One more thing that was measured, in words."""

    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "no" if value is None or value is False else "yes" if value is True else str(value)


@dataclass(frozen=True)
class Report:
    """A table with everything that it takes to repeat it."""

    title: str
    command: str
    commit: str | None
    machine: str
    results: Sequence[Result | Row]
    facts: Sequence[Fact] = ()
    settings: dict[str, object] = field(default_factory=dict)
    day: date = field(default_factory=date.today)
    legend: str = LEGEND

    def table(self) -> str:
        """The results as a Markdown table."""
        return markdown([result.row() for result in self.results])

    def markdown(self) -> str:
        """The whole report."""
        facts = {
            "date": self.day.isoformat(),
            "commit": self.commit or "unknown",
            "machine": self.machine,
            "torch": torch.__version__,
            **self.settings,
        }
        lines = [f"# {self.title}", "", "```", self.command, "```", ""]
        lines += [f"- {name}: {_shown(value)}" for name, value in facts.items()]
        legend = self.legend + (_OPERATIONS if any(result.operations for result in self.results) else "")
        found = [*(f"- {fact}" for fact in self.facts), ""] if self.facts else []
        table = [self.table(), ""] if self.results else []
        return "\n".join([*lines, "", *table, *found, *([legend] if table else [])])

    def write(self, folder: Path, name: str) -> Path:
        """FOLDER/DATE-NAME.md, or -2, -3 and so on where it exists: a measurement is never overwritten."""
        require_folder(folder, "--out")
        folder.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = folder / f"{self.day.isoformat()}-{name}{f'-{number}' if number > 1 else ''}.md"
            try:
                with path.open("x", encoding="utf-8") as file:
                    file.write(self.markdown())
            except FileExistsError:
                number += 1
                continue
            return path
