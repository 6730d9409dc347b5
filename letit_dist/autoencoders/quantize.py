"""Vector quantisation with a codebook learnt by running means (VQ-VAE, 1711.00937, appendix A.1).

The update is split from the forward pass: forward adds to the statistics of the global batch, over any number
of microbatches, and `update` moves the codebook by them, once they are summed over the ranks. The codes of a batch are
therefore looked up before its update, as in the published code, and the result does not depend on how the
batch was divided.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from letit_dist import rng

# Rows whose distances are held at once: 32 MiB of float32 at 512 codes.
_ROWS = 16384
_EPS = 1e-5


class BatchPlace(NamedTuple):
    """Where the samples of a microbatch stand in the global batch; draws depend on nothing else."""

    seed: int
    positions: Tensor  # (B,) integers in [0, global_batch)
    global_batch: int


class CodebookStats(NamedTuple):
    """Scalars on the codebook's device, of the whole global batch."""

    perplexity: Tensor  # exp of the entropy of code use, in [1, codes]
    usage: Tensor  # share of the codes that were used, in [0, 1]
    restarted: Tensor  # codes replaced by this update


class Quantizer(nn.Module):
    """Codebook (codes, code_dim): nearest code by squared distance, straight-through gradient.

    State: `embed` (K, D) the codes, `cluster_size` (K,) and `embed_avg` (K, D) the running counts and sums,
    `updates` the number of updates. As in the published code the counts start at 0 beside sums that start at
    the codes: a code that the first batches leave out is thrown far away (its sum is divided by about eps) and
    comes back over a thousand updates or so, as its sum decays. `restart_below` shortens that.

    Restart (not in the published code): at every `restart_every`-th update, codes whose running count is below
    `restart_below` (in uses per update; 0 = never) are replaced by encoder outputs of the current batch. Each
    code's candidate (sample, location) is drawn from (seed, purpose with `name`, update), so that it is the
    same row for every division into ranks and microbatches.
    """

    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    updates: Tensor

    def __init__(
        self,
        codes: int,
        code_dim: int,
        *,
        decay: float = 0.99,
        restart_below: float = 0.0,
        restart_every: int = 50,
        name: str = "",
    ):
        super().__init__()
        self.decay = decay
        self.restart_below = restart_below
        self.restart_every = restart_every
        self.name = name
        embed = torch.randn(codes, code_dim)
        self.register_buffer("embed", embed)
        self.register_buffer("cluster_size", torch.zeros(codes))
        self.register_buffer("embed_avg", embed.clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self._updates: int | None = 0
        # Not buffers: DDP broadcasts buffers from rank 0 in every forward, and each rank has its own sums here.
        self._sums: Tensor | None = None

    def extra_repr(self) -> str:
        """The numbers of this codebook, in the printed module."""
        codes, code_dim = self.embed.shape
        return f"codes={codes}, code_dim={code_dim}, decay={self.decay}, restart_below={self.restart_below}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._updates = None

    def _update_count(self) -> int:
        # A copy on the host: the draws need the number in every step, and reading a buffer waits for the device.
        if self._updates is None:
            self._updates = int(self.updates)
        return self._updates

    def lookup(self, z: Tensor) -> Tensor:
        """Encoder outputs (B, D, H, W) to codes (B, H, W), without statistics."""
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            return self._nearest(self._rows(z)).view(z.shape[0], *z.shape[2:])

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Codes (B, H, W) to their vectors (B, D, H, W)."""
        return F.embedding(codes, self.embed).permute(0, 3, 1, 2)

    def forward(
        self, z: Tensor, *, collect: bool = False, place: BatchPlace | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise encoder outputs z (B, D, H, W).

        Returns the quantised map (B, D, H, W) with the gradient of z, the commitment mean((sg(q) - z)^2) as a
        scalar, and the codes (B, H, W). `collect` adds the batch to the statistics of the next `update`;
        `place` also picks this batch's candidates for a restart (without it no code is restarted).
        """
        with torch.autocast(z.device.type, enabled=False):
            with torch.no_grad():
                rows = self._rows(z)
                nearest = self._nearest(rows)
                codes = nearest.view(z.shape[0], *z.shape[2:])
                quantised = self.embed_codes(codes).to(rows.dtype)
                if collect:
                    self._collect(rows, nearest, place)
            z = z.to(rows.dtype)
            commitment = F.mse_loss(z, quantised).clone()  # the scalar itself holds memory as large as z
            # z - sg(z) is exactly 0: the values are the codes, unlike z + sg(q - z), which rounds.
            return quantised + (z - z.detach()), commitment, codes

    def _rows(self, z: Tensor) -> Tensor:
        """(B, D, H, W) to (B * H * W, D) in float32 or wider; a view of z in channels_last."""
        wide = torch.promote_types(torch.promote_types(z.dtype, self.embed.dtype), torch.float32)
        return z.detach().permute(0, 2, 3, 1).reshape(-1, z.shape[1]).to(wide)

    def _nearest(self, rows: Tensor) -> Tensor:
        """(N, D) to (N,): argmin_k |e_k|^2 - 2 x.e_k; |x|^2 is the same for all codes and only adds rounding."""
        embed = self.embed.to(rows.dtype)
        norms = embed.square().sum(1)
        parts = [torch.addmm(norms, part, embed.t(), alpha=-2).argmin(1) for part in rows.split(_ROWS)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _restart_is_due(self) -> bool:
        return self.restart_below > 0 and (self._update_count() + 1) % self.restart_every == 0

    def sums(self) -> Tensor:
        """What the next `update` goes by: (K, 1 + D) float64, counts and sums of the rows collected since the last one;
        where a restart is due (K, 2 + 2 D), and for each code whether this rank found its candidate, and the row.

        Who trains on several ranks sums it over them, in place, between the last forward pass and `update`.
        """
        if self._sums is None:
            codes, code_dim = self.embed.shape
            columns = (1 + code_dim) * (2 if self._restart_is_due() else 1)
            self._sums = torch.zeros(codes, columns, dtype=torch.float64, device=self.embed.device)
        return self._sums

    def _collect(self, rows: Tensor, nearest: Tensor, place: BatchPlace | None) -> None:
        codes, code_dim = self.embed.shape
        total = self.sums()
        # Within a microbatch in the dtype of the rows, across microbatches and ranks in float64.
        sums = rows.new_zeros(codes, code_dim).index_add_(0, nearest, rows)
        counts = rows.new_zeros(codes).index_add_(0, nearest, rows.new_ones(len(nearest)))
        total[:, 0] += counts
        total[:, 1 : 1 + code_dim] += sums
        if place is not None and self._restart_is_due():
            self._collect_candidates(total[:, 1 + code_dim :], rows, place)

    def _collect_candidates(self, candidates: Tensor, rows: Tensor, place: BatchPlace) -> None:
        codes = len(self.embed)
        positions = place.positions.to(rows.device)
        places = len(rows) // len(positions)  # locations in one map
        draws = rng.generator(place.seed, f"codebook restart {self.name}".strip(), self._update_count())
        # Without repetition: two codes at one place would tie, and rounding would choose between them.
        drawn = torch.randperm(place.global_batch * places, generator=draws)[:codes]
        drawn = F.pad(drawn, (0, codes - len(drawn)), value=-1).to(rows.device)  # -1: no row left for this code
        sample, location = drawn.div(places, rounding_mode="floor"), drawn % places
        hits = sample[:, None] == positions[None, :]  # (K, B)
        found = hits.any(1, keepdim=True)
        own = rows[hits.to(torch.uint8).argmax(1) * places + location]
        candidates.copy_(torch.where(found, torch.cat([found.to(rows.dtype), own], 1), candidates))

    def discard(self) -> None:
        """Forget the batch collected since the last update (a step that is skipped, say)."""
        self._sums = None

    @torch.no_grad()
    def update(self) -> CodebookStats:
        """Move the codebook by `sums`, once a global batch: running means, restart, and then codes = sums /
        Laplace-smoothed counts."""
        codes, code_dim = self.embed.shape
        width = 1 + code_dim
        restart = self._restart_is_due()
        packed = self.sums()
        self.discard()
        counts, sums = packed[:, 0], packed[:, 1:width]
        self.cluster_size.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        self.embed_avg.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        restarted = torch.zeros((), device=packed.device)
        if restart:
            restarted = self._restart(packed[:, width] > 0, packed[:, width + 1 :])
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + _EPS) / (total + codes * _EPS) * total
        # Before any sample was seen the counts say nothing (0 / 0), and the codes stay.
        self.embed.copy_(torch.where(total > 0, self.embed_avg / smoothed[:, None], self.embed))
        self._updates = self._update_count() + 1
        self.updates.add_(1)
        share = counts / counts.sum().clamp(min=1)
        perplexity = torch.exp(torch.special.entr(share).sum())
        return CodebookStats(perplexity, (counts > 0).double().mean(), restarted)

    def _restart(self, found: Tensor, rows: Tensor) -> Tensor:
        """Give dead codes their candidate rows (K, D), with a running count just at the threshold."""
        dead = found & (self.cluster_size < self.restart_below)
        rows = rows.to(self.embed.dtype)
        self.cluster_size.masked_fill_(dead, self.restart_below)
        self.embed_avg.copy_(torch.where(dead[:, None], rows * self.restart_below, self.embed_avg))
        return dead.sum()
