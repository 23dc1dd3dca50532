"""What pruning should preserve: scalar objectives of the output distribution and their gradients.

An objective is evaluated a slice of positions at a time, so the `[positions, vocabulary]` matrix of logits never exists
as a whole: extra memory is a few `[slice, vocabulary]` float32 matrices, whatever the number of positions. Objectives
asked for together share the logits.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hifiprune.engine.reproducible import cumulative
from hifiprune.engine.sliced_objective import Rows


def entropy_(logits: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows"]:
    """Compute the entropy of each row's distribution, in nats; overwrites `logits` with its gradient.

    Same as `H = -(p * p.log()).sum(-1)` with `p = logits.softmax(-1)`, and `logits <- dH/dlogits = -p * (p.log() + H)`,
    with one exponential and one scratch matrix. Source: arXiv 2603.08083, eq. 3.
    """
    logits -= logits.amax(-1, keepdim=True)
    weights = logits.exp()
    normaliser = weights.sum(-1, keepdim=True)
    mean: Tensor = torch.linalg.vecdot(weights, logits).unsqueeze(-1) / normaliser
    values = normaliser.log() - mean
    # -p * (log p + H) = -w / Z * (z - mean): the row's log-normaliser cancels.
    logits.sub_(mean).mul_(weights).div_(-normaliser)
    return values.squeeze(-1)


def cross_entropy_(
    logits: Float[Tensor, "rows vocabulary"], labels: Int[Tensor, "rows"], weights: Float[Tensor, "rows"]
) -> Float[Tensor, "rows"]:
    """Compute the weighted cross-entropy of each row, in nats; overwrites `logits` with its gradient.

    Same as `weights * F.cross_entropy(logits, labels, reduction="none")`, and `logits <- weights * (p - onehot(y))`.
    """
    answers = _at(logits, labels)
    values = softmax_(logits) - answers
    _subtract_at_(logits, labels, torch.ones_like(weights))
    logits *= weights.unsqueeze(1)
    return values * weights


@dataclass(frozen=True)
class Entropy:
    """The entropy of the output distribution."""

    def __call__(self, rows: Rows) -> Float[Tensor, "rows"]:
        """See `entropy_`."""
        return entropy_(rows.logits)


@dataclass(frozen=True)
class CrossEntropy:
    """The cross-entropy of the next token, over the positions of a window that have one."""

    def __call__(self, rows: Rows) -> Float[Tensor, "rows"]:
        """See `cross_entropy_`."""
        return cross_entropy_(rows.logits, rows.labels, rows.weights)


@dataclass(frozen=True)
class Distillation:
    """Cross-entropy mixed with the divergence from a teacher, arXiv 2506.11120.

    Attributes:
        alpha: share of the divergence.
        temperature: of the teacher alone.
    """

    alpha: float
    temperature: float

    def __call__(self, rows: Rows) -> Float[Tensor, "rows"]:
        """Value of each row in nats; overwrites the logits with its gradient.

        Same as `(1 - alpha) * weights * CE + alpha * KL(p || q)` with `p = (teacher / temperature).softmax(-1)` and
        `q = logits.softmax(-1)`. Where the teacher's logits are the student's own and alpha and temperature are 1, the
        gradient is exactly zero.
        """
        assert rows.teacher is not None
        logits, targets = rows.logits, rows.teacher / self.temperature
        probs = targets.clone()
        own = -softmax_(probs) + torch.linalg.vecdot(probs, targets)
        across = torch.linalg.vecdot(probs, logits)
        answers = _at(logits, rows.labels)
        normaliser = softmax_(logits)
        hard = (1 - self.alpha) * rows.weights
        values: Tensor = self.alpha * (own + normaliser - across) + hard * (normaliser - answers)
        logits.mul_((self.alpha + hard).unsqueeze(1)).sub_(probs.mul_(self.alpha))
        _subtract_at_(logits, rows.labels, hard)
        return values


@dataclass(frozen=True)
class SoftLabels:
    """Cross-entropy mixed with the divergence from a teacher as in recovery training, after Hinton (arXiv 1503.02531).

    Attributes:
        share: of the divergence.
        temperature: of both distributions in it.
    """

    share: float
    temperature: float = 1.0

    def __call__(self, rows: Rows) -> Float[Tensor, "rows"]:
        """Value of each row in nats; overwrites the logits with its gradient.

        Same as `(1 - share) * weights * CE + share * T ** 2 * KL(p || q)` with `p = (teacher / T).softmax(-1)`,
        `q = (logits / T).softmax(-1)`.
        """
        if self.share == 0:
            return cross_entropy_(rows.logits, rows.labels, rows.weights)
        if self.temperature == 1:
            return Distillation(self.share, 1.0)(rows)
        assert rows.teacher is not None
        heat = self.temperature
        softened = replace(rows, logits=rows.logits / heat, teacher=rows.teacher / heat)
        soft = Distillation(1.0, 1.0)(softened)
        hard = cross_entropy_(rows.logits, rows.labels, rows.weights)
        rows.logits.mul_(1 - self.share).add_(softened.logits, alpha=self.share * heat)
        return (1 - self.share) * hard + self.share * heat**2 * soft


@dataclass(frozen=True)
class SampledLabel:
    """Cross-entropy with a label drawn from the model's own distribution at every position.

    The covariance of its gradient is the Fisher information, the curvature of the KL divergence. Several samples are
    drawn systematically: each label follows the model's distribution, independently of other positions, but the samples
    of one position are spread over it.

    Attributes:
        seed: of the draws.
        sample: number of this sample.
        samples: how many there are.
    """

    seed: int
    sample: int = 0
    samples: int = 1

    def __call__(self, rows: Rows) -> Float[Tensor, "rows"]:
        """Same as `cross_entropy_` with `labels = torch.multinomial(p, 1)`."""
        noise = torch.Generator().manual_seed(self.seed * 1_000_003 + rows.window)
        draws = torch.rand(rows.positions, generator=noise, dtype=torch.float64)[rows.start :][: len(rows.logits)]
        draws = ((draws + self.sample / self.samples) % 1).to(rows.logits, non_blocking=True)
        draws.clamp_(max=1 - torch.finfo(draws.dtype).eps)  # float32 rounds up to 1, where no label is
        reached = rows.logits.clone()
        softmax_(reached)
        reached = cumulative(reached)
        labels = torch.searchsorted(reached, (draws * reached[:, -1]).unsqueeze(1), right=True).squeeze(1)
        return cross_entropy_(rows.logits, labels, torch.ones_like(draws))


def softmax_(logits: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows"]:
    """Overwrite logits with probabilities and return the log-normaliser, `logits.logsumexp(-1)`."""
    top = logits.amax(-1, keepdim=True)
    normaliser = logits.sub_(top).exp_().sum(-1, keepdim=True)
    logits /= normaliser
    return (top + normaliser.log()).squeeze(-1)


def _at(matrix: Tensor, columns: Int[Tensor, "rows"]) -> Float[Tensor, "rows"]:
    return matrix.gather(1, columns.unsqueeze(1)).squeeze(1)


def _subtract_at_(matrix: Tensor, columns: Int[Tensor, "rows"], values: Float[Tensor, "rows"]) -> None:
    matrix.scatter_add_(1, columns.unsqueeze(1), -values.unsqueeze(1))
