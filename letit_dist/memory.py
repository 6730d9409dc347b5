"""What a pass over images takes in memory, and how many images at once a budget allows.

That is measured on a real pass, so it holds for every autoencoder and energy. On a CPU two witnesses are asked: the
dispatcher, which sees every tensor that lives, those that autograd saves too, but not what a convolution borrows
inside; and the system, which sees all of it, but not what fits into memory that was freed before.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import resource
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from letit_dist.errors import UserError
from letit_dist.ranks import place_on_machine

Precision = Literal["fp32", "bf16"]
GIB = 1 << 30
CPU_GIB = 4.0  # the budget where none is given
GPU_SHARE = 0.8  # of the free memory, likewise
ALLOWANCE = 1.1  # on what is measured: freed blocks leave gaps
LOOK = 384 << 20  # bytes of a measurement on several images
# Where the system does not tell the peak: the workspaces of convolutions took up to as much again as the tensors.
UNSEEN = 2.0
_MMAP_FROM, _TRIM_FROM = 4 << 20, 32 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


def available_bytes() -> int | None:
    """How many bytes of main memory this process may still take, its share where a machine has several ranks.

    The least of what the system has, the container's limit leaves and the process's own (ulimit -v) leaves; None
    where the system tells none of them.
    """
    free = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        free.append(int(line.split()[1]) << 10)
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        limit, used = (int(Path("/sys/fs/cgroup", f"memory.{name}").read_text()) for name in ("max", "current"))
        free.append(limit - used)
    _, ranks = place_on_machine()
    free = [value // ranks for value in free]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(OSError, ValueError):
        if soft != resource.RLIM_INFINITY:
            free.append(soft - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize())
    return max(min(free), 0) if free else None


class Weighted(Protocol):
    """What holds weights, as a torch module does."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def buffers(self) -> Iterator[Tensor]: ...


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that come to be inside and have not died."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Torch's own answer, True, imports its compiler at the first operation: two seconds and 150 MB.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What an operation is given may be older than this mode: views of weights are no new memory.
        for tensor in _tensors((args, kwargs)):
            self._meet(tensor.untyped_storage(), new=False)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._meet(tensor.untyped_storage(), new=True)
        return result

    def _meet(self, storage: torch.UntypedStorage, *, new: bool) -> None:
        place = storage._cdata
        if place in self._known:
            return
        size = storage.nbytes() if new else 0

        def gone(_: weakref.ref[torch.UntypedStorage]) -> None:
            self._live -= size
            self._known.pop(place, None)

        self._known[place] = weakref.ref(storage, gone)
        self._live += size
        self.peak = max(self.peak, self._live)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def peak_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes of tensors that `function()` holds at once, of those that it makes itself.

    On a GPU this is the allocator's own count, workspaces included; on a CPU workspaces are not seen.
    """
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with _Live() as live:
        function()
    return live.peak


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def resident_bytes() -> int:
    """Memory of this process that is in use, program code included."""
    return _status("VmRSS")


def resident_peak_of(function: Callable[[], object]) -> int:
    """The most memory of this process that is in use while `function()` runs; OSError if the system does not tell."""
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak of resident memory starts anew
    function()
    return _status("VmHWM")


def cost_of(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes that `function()` takes while it runs and gives back: tensors, and workspaces as far as they show."""
    if torch.device(device).type != "cpu":
        return peak_bytes(function, device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak of resident memory starts anew
    except OSError:
        return round(UNSEEN * peak_bytes(function))
    tensors = peak_bytes(function)
    return max(tensors, _status("VmHWM") - resident_bytes())


def return_freed_memory() -> None:
    """Let glibc hand what is free back to the system, and from now on blocks of 4 MiB and more at once.

    By itself it begins to keep blocks of up to 32 MiB: a third more memory for an energy at 1024 pixels, and gaps
    that nobody can foretell. Without effect elsewhere.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_FROM)
        # The default of 128 KiB, which comes with the line above, would give small blocks back all the time.
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_FROM)
        libc.malloc_trim(0)


def chunk_for(budget: int, base: int, per_image: int) -> int:
    """How many images at once fit into `budget` bytes of which `base` are taken; 0 where not one does."""
    return max(0, budget - base) // max(1, per_image)


def budget_bytes(gib: float | None, device: torch.device | str = "cpu") -> int:
    """The budget in bytes: `gib` GiB, or 4 GiB on a CPU and 80 % of the free memory on a GPU."""
    if gib is not None and not (gib > 0 and math.isfinite(gib)):
        raise UserError(f"--memory {gib:g}: expected GiB, more than 0")
    if gib is not None:
        return int(gib * GIB)
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device) + int(GPU_SHARE * torch.cuda.mem_get_info(device)[0])
    return int(CPU_GIB * GIB)


@dataclass(frozen=True)
class MemoryPlan:
    """How many images go through at once, and what that takes, in bytes. As text: one line for people."""

    images: int
    weights: int
    per_image: int
    beside: int  # that no chunk size changes, such as a sheet that is being drawn
    runtime: int  # torch itself, and the program
    before: int  # the peak so far: reading the weights can take more than using them
    budget: int

    @property
    def peak(self) -> int:
        return max(self.before, self.weights + self.runtime + self.beside + self.images * self.per_image)

    def __str__(self) -> str:
        return f"memory: about {self.peak / GIB:.1f} GiB at the peak ({self.parts}); budget {self.budget / GIB:.1f}"

    @property
    def parts(self) -> str:
        """What makes up the peak, in GiB."""
        images = "1 image" if self.images == 1 else f"{self.images} images"
        parts = [f"weights {self.weights / GIB:.1f}", f"{images} at once x {self.per_image / GIB:.2g}"]
        parts += [f"sheets and paths {self.beside / GIB:.1f}"] if self.beside else []
        parts += [f"runtime {self.runtime / GIB:.1f}"] if self.runtime else []
        parts += [f"reading the weights {self.before / GIB:.1f}"] if self.peak == self.before else []
        return ", ".join(parts)


def plan_memory(
    run: Callable[[int], object],
    *,
    modules: Iterable[Weighted],
    most: int,
    budget: int,
    precision: Precision,
    device: torch.device | str = "cpu",
    kept: int = 0,
    beside: int = 0,
) -> MemoryPlan:
    """How many images, at most `most`, go through at once within `budget` bytes (see `budget_bytes`).

    `run(n)` is the work for n images. It is run for one and, where that is little, for as many as take about 384
    MiB: what depends on the weights alone outweighs one small image. More than were run are taken to need as much
    each, which is never too little. `kept` are bytes for each image that `run` does not show, `beside` those that do
    not grow with the images. Raises UserError where not even one image fits.
    """
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu:
        return_freed_memory()
    before = _status("VmHWM") if on_cpu else 0
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    weights = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
    seen, more = 0, 1
    while more > seen:
        seen = more
        cost = cost_of(partial(run, seen), device) / seen
        # What torch and the program hold for good after the first pass is no image's.
        base = resident_bytes() if on_cpu else torch.cuda.memory_allocated(device)
        per_image = round(ALLOWANCE * cost) + kept
        images = min(most, chunk_for(budget, base + beside, per_image))
        more = min(images, int(LOOK / max(1, cost)))
    result = MemoryPlan(max(1, images), weights, per_image, beside, max(0, base - weights), 0, budget)
    if images < 1:
        lower = ", or --precision bf16" if precision == "fp32" and has_bf16(device) else ""
        raise UserError(
            f"one image at a time takes about {result.peak / GIB:.2f} GiB ({result.parts}), the budget is "
            f"{budget / GIB:.2f}: give --memory {math.ceil(result.peak / GIB * 10) / 10:g}{lower}"
        )
    return replace(result, before=before)


def has_bf16(device: torch.device | str = "cpu") -> bool:
    """Whether bfloat16 pays there: a CPU without such instructions computes it many times slower than float32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def slow_precision(precision: Precision, device: torch.device | str = "cpu") -> str | None:
    """A line that warns of a precision that does not pay on this device, or None."""
    if precision == "fp32" or has_bf16(device):
        return None
    return "notice: this processor has no bfloat16 arithmetic: --precision bf16 is many times slower here than fp32"


def lowered(precision: Precision, device: torch.device | str = "cpu") -> contextlib.AbstractContextManager[object]:
    """The context in which networks run at `precision`: autocast for bf16, nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
