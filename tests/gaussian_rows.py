"""Samples whose mean and covariance are known to the last digit."""

import torch


def draw(*shape, seed=0):
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_with(mean, covariance, count, seed=0):
    """(count, D) float64 with exactly this mean and unbiased covariance."""
    x = draw(count, len(mean), seed=seed).double()
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.t() @ x / (count - 1))).t()
    return x @ torch.linalg.cholesky(covariance.double()).t() + mean.double()
