"""Latent variable models on finite alphabets, whose draws are the whole distribution in exact proportion.

Every probability is a whole number of parts, and a batch of draws has each outcome that often: the loss of a batch, as
training computes it, *is* the expectation, and can be compared with the sum over the table to rounding. Codes and data
are numbers ``0, 1, …``, one in a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from implicitvi.avb.contrasts import Contrast

DATA, CODES = 3, 4  # sizes of the alphabets
PARTS = 12  # parts of each conditional, and draws that give them all
ROWS = PARTS * PARTS  # rows of a batch: each datum a multiple of PARTS times


class Whole(Distribution):
    """Tables ``p [..., K]`` by batch; its draws go through the outcomes in turn.

    Rows of a batch that have the same ``key`` are told apart by their turn, so that together they give the whole.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = True

    def __init__(self, p: Tensor, key: Tensor | None = None):
        self.p = p
        self.key = key
        super().__init__(p.shape[:-1], torch.Size([1]), validate_args=False)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        shape = torch.Size(sample_shape)
        lead = shape + self.batch_shape
        if shape:
            turn = torch.arange(shape[0]).reshape(-1, *[1] * (len(lead) - 1)).expand(lead)
        else:
            turn = torch.zeros(lead) if self.key is None else turns(self.key)
        upto = self.p.cumsum(-1).mul(PARTS).round()
        outcome = (turn[..., None] % PARTS >= upto).sum(-1, keepdim=True)
        return outcome.to(self.p.dtype)

    sample = rsample

    def log_prob(self, value: Tensor) -> Tensor:
        index = value.long()
        shape = torch.broadcast_shapes(self.p.shape[:-1], index.shape[:-1])
        table = self.p.log().expand(*shape, -1)
        return table.gather(-1, index.expand(*shape, 1)).squeeze(-1)


def turns(key: Tensor) -> Tensor:
    """How often each entry of ``key`` has stood before it."""
    flat = key.flatten()
    before = (flat[:, None] == flat) & (torch.arange(len(flat)) < torch.arange(len(flat))[:, None])
    return before.sum(1).view_as(key)


class Arrow(nn.Module):
    """An encoder or decoder that looks its distribution up: ``table [K, L]``."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, given: Tensor) -> Distribution:
        key = given[..., 0].long()
        return Whole(self.table[key], key)


class TablePrior(nn.Module):
    def __init__(self, p: Tensor):
        super().__init__()
        self.p = p

    def forward(self) -> Distribution:
        return Whole(self.p)


class Lookup(nn.Module):
    """An adversary that looks its score up: ``scores [Z, X]`` of pairs, ``[Z]`` of codes or ``[X]`` of data alone."""

    def __init__(self, scores: Tensor):
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, *inputs: Tensor) -> Tensor:
        index = torch.broadcast_tensors(*(each[..., 0].round().long() for each in inputs))
        return self.scores[index]


class TableContrast(Contrast):
    """A table for the contrast, whatever the data."""

    def __init__(self, p: Tensor):
        super().__init__()
        self.p = p

    def forward(self, z: Tensor, x: Tensor | None = None) -> Distribution:
        return Whole(self.p)

    def standardise(self, z: Tensor, r: Distribution) -> Tensor:
        return z


class Tables:
    """Random tables of a data distribution, a prior, encoder and decoder, and what follows from them.

    Joint tables are ``[Z, X]``.
    """

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.x = parts([DATA], generator)
        self.contrast = parts([DATA], generator)
        self.z = parts([CODES], generator)
        self.z_given_x = parts([DATA, CODES], generator)
        self.x_given_z = parts([CODES, DATA], generator)
        self.q = (self.x[:, None] * self.z_given_x).T
        self.p = self.z[:, None] * self.x_given_z
        self.q_z, self.p_x = self.q.sum(1), self.p.sum(0)

    def networks(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Encoder, decoder and prior."""
        return Arrow(self.z_given_x), Arrow(self.x_given_z), TablePrior(self.z)

    def batch(self) -> Tensor:
        """All data ``[ROWS, 1]``, each as often as its probability says."""
        index = torch.arange(DATA).repeat_interleave((self.x * ROWS).round().long())
        return index[:, None].double()

    @property
    def elbo(self) -> Tensor:
        """``E_q[log p(x, z) - log q(z | x)]``."""
        return expectation(self.q, self.p.log() - self.z_given_x.T.log())


def parts(shape: list[int], generator: torch.Generator) -> Tensor:
    """Random tables whose last axis sums to 1, each entry a positive number of ``PARTS``."""
    *lead, count = shape
    weights = torch.rand(*lead, PARTS - 1, generator=generator).argsort(-1) < count - 1
    cuts = weights.nonzero(as_tuple=True)[-1].reshape(*lead, count - 1) + 1
    ends = torch.cat([torch.zeros(*lead, 1), cuts, torch.full((*lead, 1), PARTS)], -1)
    return ends.diff(dim=-1).double() / PARTS


def expectation(p: Tensor, f: Tensor) -> Tensor:
    return (p * f).sum()


def kl(p: Tensor, q: Tensor) -> Tensor:
    """``KL(p ‖ q)`` of two tables, in nats."""
    return expectation(p, p.log() - q.log())


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """In nats, at most ``log 2``."""
    middle = (p + q) / 2
    return (kl(p, middle) + kl(q, middle)) / 2


def entropy(p: Tensor) -> Tensor:
    """In nats."""
    return -expectation(p, p.log())
