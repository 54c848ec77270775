"""Restarts as one: their networks and their log joint are evaluated in one batched call for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from implicitvi.avb.objective import elbo, tighten
from implicitvi.avb.players import Turn
from implicitvi.avb.samplers import MixtureSampler, Sampler
from implicitvi.inference.amortized_objective import AmortizedProblem
from implicitvi.inference.objective import Arguments, Problem, loss_of, with_metrics
from implicitvi.rng import RandomStream
from implicitvi.training import Player, Stage, Trainer
from implicitvi.training.lockstep import Lockstep, Losses, Turns

PROBES = 8  # inputs at which a stack is held against its networks
NOT_STACKED = (RuntimeError, ValueError, TypeError, KeyError)  # of networks that cannot be, by vmap


class Stack:
    """Networks of one structure as one, on inputs of their own: `torch.func.functional_call` under `torch.vmap`.

    Gradients reach the networks' own parameters, which stay where they are.

    >>> nets = [nn.Linear(2, 3) for _ in range(4)]
    >>> Stack(nets)(torch.zeros(4, 5, 2)).shape
    torch.Size([4, 5, 3])
    """

    def __init__(self, networks: Sequence[nn.Module]):
        self._networks = tuple(networks)
        tensors = [{**dict(n.named_parameters()), **dict(n.named_buffers())} for n in networks]
        self._tensors = {name: [each[name] for each in tensors] for name in tensors[0]}
        self._body = deepcopy(networks[0]).to("meta")

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Inputs ``[R, ...]`` to outputs ``[R, ...]``, the ``r``-th by the ``r``-th network."""
        stacked = {name: torch.stack(tensors) for name, tensors in self._tensors.items()}
        outputs: Tensor = torch.vmap(self._one)(stacked, inputs)
        return outputs

    @torch.no_grad()
    def agrees(self, *inputs: Tensor) -> bool:
        """Whether the outputs for inputs ``[R, ...]`` are those of the networks by themselves, to rounding.

        Not of networks whose buffers change as they are called, such as running means: a stack would not keep that.
        """
        networks = [deepcopy(network) for network in self._networks]
        buffers = [buffer for network in networks for buffer in network.buffers()]
        before = [buffer.clone() for buffer in buffers]
        each = [network(*parts) for network, *parts in zip(networks, *inputs, strict=True)]
        if not all(((a == b) | (a != a)).all() for a, b in zip(buffers, before, strict=True)):
            return False
        return torch.allclose(self(*inputs), torch.stack(each), rtol=1e-3, atol=1e-4)

    def _one(self, tensors: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        outputs: Tensor = functional_call(self._body, tensors, inputs)
        return outputs


def on_accelerator(arguments: Arguments) -> bool:
    """Whether the data of a fit are on a device where a small network leaves most of its time unused."""
    return any(device != "cpu" for device in arguments.devices())


def stacked(
    problems: Sequence[Problem | AmortizedProblem],
    trainers: Sequence[Trainer],
    arguments: Arguments,
) -> Lockstep | None:
    """One loop for several fits of a posterior, ``None`` where they cannot be computed at once.

    That is: guides that are amortized, samplers that have been split into far modes or draw in their own way,
    minibatches, of which each fit sees its own, fits at different steps, and networks that vmap does not take.
    """
    alone = [problem for problem in problems if isinstance(problem, Problem)]
    if len(alone) < len(problems) or alone[0].log_joint.minibatches:
        return None
    if len({trainer.step_count for trainer in trainers}) > 1:
        return None
    samplers = [problem.avb.sampler for problem in alone]
    if any(
        isinstance(s, MixtureSampler) or type(s).forward is not Sampler.forward for s in samplers
    ):
        return None
    try:
        whole = StackedProblem(alone, trainers, arguments)
        return whole.lockstep() if whole.agrees() else None
    except NOT_STACKED:
        return None


class _Placed(nn.Module):
    """A sampler as a network from its noise to its draws."""

    def __init__(self, sampler: Sampler):
        super().__init__()
        self.sampler = sampler

    def forward(self, eps: Tensor) -> Tensor:
        return self.sampler.place(self.sampler.transform(eps))


class StackedProblem:
    """The objectives of several fits of one posterior, their heavy parts batched; each fit draws from its own stream.

    Args:
        problems: The objective of each fit.
        trainers: Its loop.
        arguments: The model's arguments.
    """

    def __init__(
        self, problems: Sequence[Problem], trainers: Sequence[Trainer], arguments: Arguments
    ):
        self.problems = tuple(problems)
        self.avbs = [problem.avb for problem in problems]
        self.trainers = tuple(trainers)
        self.arguments = arguments
        self._draw = Stack([_Placed(avb.sampler) for avb in self.avbs])
        self._score = Stack([avb.adversary for avb in self.avbs])
        self._judge = Stack([avb.opponent for avb in self.avbs])

    def agrees(self) -> bool:
        """Whether the stacks say what their networks say, at a few inputs."""
        avb = self.avbs[0]
        like, rng = avb.sampler.loc, torch.Generator().manual_seed(0)
        dims = (avb.sampler.noise_dim, avb.sampler.latent_dim + avb.contrast.marks)
        shape = (len(self.avbs), PROBES)
        eps, w = (torch.randn((*shape, dim), generator=rng).to(like) for dim in dims)
        shown = (w, w[..., 0]) if avb.informed else (w,)
        return self._draw.agrees(eps) and self._score.agrees(*shown) and self._judge.agrees(*shown)

    def lockstep(self) -> Lockstep:
        """The loop of all fits."""
        batched = {"adversary": self.adversary_losses, "sampler": self.sampler_losses}
        columns = zip(*(trainer.players for trainer in self.trainers), strict=True)
        turns = [batched.get(players[0].name, self._alone(players)) for players in columns]
        return Lockstep(self.trainers, turns)

    def adversary_losses(self, stage: Stage) -> Iterator[Losses]:
        """As `AVB.adversary_losses` of each fit."""
        count = stage.num_particles
        with torch.no_grad():
            draws = self._sample(count * stage.adversary_steps)
        each = []
        for problem, trainer, z in zip(self.problems, self.trainers, draws, strict=True):
            with trainer.stream:
                scorer = problem.scorer(self.arguments, stage.beta)
                each.append(problem.avb.compare(z, count, scorer))
        shown = [torch.stack(tensors) for tensors in zip(*each, strict=True)]
        for i in range(0, count * stage.adversary_steps, count):
            scores = self._score(*(tensor[:, :, i : i + count] for tensor in shown))
            yield [(avb.ratio.loss(*s), {}) for avb, s in zip(self.avbs, scores, strict=True)]

    def sampler_losses(self, stage: Stage) -> Iterator[Losses]:
        """As the turn of `Problem.sampler_player` of each fit."""
        draws = self._sample(self.problems[0].num_particles(stage)).unbind()
        heard = [avb.hear(z) for avb, z in zip(self.avbs, draws, strict=True)]
        args, kwargs = self.arguments.args, self.arguments.kwargs
        with self.trainers[0].stream:  # a model may have random numbers of its own
            log_joints = self.problems[0].log_joint(torch.cat(heard), *args, **kwargs)
        if not log_joints.isfinite().all():  # each fit leaves out draws of its own
            bounds = [
                problem.avb.bound(z, problem.scorer(self.arguments, stage.beta))
                for problem, z in zip(self.problems, draws, strict=True)
            ]
            yield [with_metrics(loss_of(bound), dropped) for bound, dropped in bounds]
            return
        known, shown = [], []
        parts = zip(self.problems, draws, heard, log_joints.split(len(draws[0])), strict=True)
        for problem, z, u, log_joint in parts:
            log_p = problem.temper(log_joint, u, stage.beta)
            log_r, seen = problem.avb.show(z, problem.avb.contrast(z), log_p.detach())
            known.append((log_p, log_r))
            shown.append(seen)
        scores = self._judge(*(torch.stack(tensors) for tensors in zip(*shown, strict=True)))
        losses = []
        for avb, z, (log_p, log_r), score in zip(self.avbs, draws, known, scores, strict=True):
            bound = elbo(log_p, log_r, avb.ratio.log_ratio(score))
            losses.append(with_metrics(loss_of(tighten(bound, z, avb.num_importance)), 0))
        yield losses

    def _alone(self, players: Sequence[Player]) -> Turns:
        """The turn of players that are not batched."""

        def losses(stage: Stage) -> Iterator[Losses]:
            turns = [
                _drawing_from(trainer.stream, player.losses(stage))
                for trainer, player in zip(self.trainers, players, strict=True)
            ]
            yield from zip(*turns, strict=True)

        return losses

    def _sample(self, count: int) -> Tensor:
        """Draws ``[R, S, D]`` of every fit's sampler, from noise of its own stream."""
        noise = []
        for avb, trainer in zip(self.avbs, self.trainers, strict=True):
            with trainer.stream:
                noise.append(avb.sampler.noise(count))
        return self._draw(torch.stack(noise))


def _drawing_from(stream: RandomStream, turn: Turn) -> Turn:
    """A turn with its random numbers from a stream, which is left between two of its losses."""
    while True:
        with stream:
            loss = next(turn, None)
        if loss is None:
            return
        yield loss
