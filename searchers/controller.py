"""The network of `RLControllerSearch`: chooses option after option, each in the light of those before.

A neural autoregressive estimator (Larochelle and Murray 2011): what was chosen adds to a hidden
state, from which each column's head reads the distribution of its options. Drawing needs a few
small products a column, in numpy; learning sees all columns at once, in torch.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_nascomp.searchers.choices import Choices

if TYPE_CHECKING:
    import torch

_HIDDEN = 48
_RATE = 0.03
_CLIP = 0.2
_ENTROPY = 0.08
_LONGEST_GRADIENT = 1.0
_MEAN_DECAY, _SQUARE_DECAY = 0.9, 0.999


@dataclass(frozen=True)
class Experience:
    """What the controller learns from, n rows.

    Attributes:
        options: Chosen options, shape `(n, columns)`.
        active: Which of them count, shape `(n, columns)`.
        preferences: Weights of the objectives, shape `(n, objectives)`.
        advantages: How much better than expected, shape `(n,)`.
        behaviour: Log probability with which they were chosen, shape `(n,)`.
    """

    options: np.ndarray
    active: np.ndarray
    preferences: np.ndarray
    advantages: np.ndarray
    behaviour: np.ndarray


class Controller:
    """A distribution over configs, given weights of the objectives.

    Args:
        choices: Columns and their options.
        objectives: Number of objectives.
        rng: Source of the weights at the start, with which all options are equally likely.
    """

    def __init__(self, choices: Choices, objectives: int, rng: np.random.Generator) -> None:
        self._choices = choices
        columns, _, features = choices.features.shape
        scale = 1 / np.sqrt(columns * features)

        def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
            return (scale * rng.standard_normal(shape)).astype(np.float32)

        def zero(*shape: int) -> np.ndarray:
            return np.zeros(shape, dtype=np.float32)

        self.weights = {
            "start": zero(_HIDDEN),
            "preference": normal(objectives, _HIDDEN, scale=1.0),
            "choice": normal(columns, features, _HIDDEN, scale=scale),
            "head": zero(columns, _HIDDEN, features),
            "bias": zero(columns, features),
            "direct": zero(columns, objectives, features),
        }
        self._means = {name: np.zeros_like(value) for name, value in self.weights.items()}
        self._squares = {name: np.zeros_like(value) for name, value in self.weights.items()}
        self._steps = 0

    def draw(
        self, rng: np.random.Generator, preferences: np.ndarray, temperature: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """One config a row.

        Args:
            rng: Source of randomness.
            preferences: Weights of the objectives, shape `(n, objectives)`.
            temperature: What the logarithms of all odds are divided by.

        Returns:
            Options and which of them count, each of shape `(n, columns)`.
        """
        w, choices = self.weights, self._choices
        rows = np.arange(len(preferences))
        columns, count, _ = choices.features.shape
        noise = rng.gumbel(size=(columns, len(rows), count)) * temperature
        noise[np.broadcast_to(~choices.exists[:, None, :], noise.shape)] = -np.inf
        options, active = np.zeros((2, len(rows), columns), dtype=int)
        active = active.astype(bool)
        wanted = _centred(preferences)
        hidden = w["start"] + wanted @ w["preference"]
        directs = np.einsum("nm,cmf->cnf", wanted, w["direct"]) + w["bias"][:, None]
        for column in range(columns):
            features = choices.features[column]
            heads = np.tanh(hidden) @ w["head"][column] + directs[column]
            chosen = (heads @ features.T + noise[column]).argmax(axis=1)
            options[:, column] = chosen
            active[:, column] = choices.column_active(column, options, active)
            hidden = hidden + (features[chosen] @ w["choice"][column]) * active[:, column, None]
        return options, active

    def log_probability(self, options: np.ndarray, active: np.ndarray, preferences: np.ndarray) -> np.ndarray:
        """Logarithm of the probability of each row, shape `(n,)`."""
        import torch

        with torch.no_grad():
            weights = {name: torch.from_numpy(value) for name, value in self.weights.items()}
            chosen, _ = self._chances(weights, *_tensors(options, active, preferences))
            return chosen.sum(dim=1).numpy().astype(float)

    def learn(self, lessons: Sequence[Experience], epochs: int) -> None:
        """Some steps of proximal policy optimisation.

        Rows of another policy than the present one count by the ratio of their probabilities, cut
        off at 1 and apart from the step's own clipping (Hilton et al. 2021, arXiv 2110.00641).
        """
        import torch

        experience = Experience(*(np.concatenate(parts) for parts in zip(*map(_fields, lessons), strict=True)))
        parameters = {name: torch.from_numpy(value).requires_grad_() for name, value in self.weights.items()}
        options, active, preferences = _tensors(experience.options, experience.active, experience.preferences)
        advantages = torch.from_numpy(experience.advantages.astype(np.float32))
        with torch.no_grad():
            before, _ = self._chances(parameters, options, active, preferences)
            behaviour = torch.from_numpy(experience.behaviour)
            trust = (before.sum(dim=1).double() - behaviour).clamp(max=0.0).exp().float()
        counted = active.sum().clamp(min=1)
        for _ in range(epochs):
            chosen, entropy = self._chances(parameters, options, active, preferences)
            ratio = (chosen - before).exp()
            gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(1 - _CLIP, 1 + _CLIP) * advantages[:, None])
            loss = -(trust[:, None] * gain * active).sum() / counted - _ENTROPY * entropy
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            length = torch.stack([gradient.norm() for gradient in gradients]).norm()
            shrink = float((_LONGEST_GRADIENT / length.clamp(min=1e-12)).clamp(max=1.0))
            self._descend({n: (g * shrink).numpy() for n, g in zip(parameters, gradients, strict=True)})

    def to_dict(self) -> dict[str, Any]:
        """Weights and the optimizer's state, as plain values."""
        arrays = {"weights": self.weights, "means": self._means, "squares": self._squares}
        texts = {kind: {name: _to_text(value) for name, value in values.items()} for kind, values in arrays.items()}
        return {"steps": self._steps, **texts}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes back what `to_dict` has given."""
        self._steps = state["steps"]
        for kind, values in (("weights", self.weights), ("means", self._means), ("squares", self._squares)):
            for name, value in values.items():
                values[name] = _from_text(state[kind][name], value.shape)

    def _descend(self, gradients: dict[str, np.ndarray]) -> None:
        """A step of Adam (Kingma and Ba 2015, arXiv 1412.6980).

        Its own, because torch's optimizers load a compiler at their first use, which holds up the
        driver for seconds.
        """
        self._steps += 1
        for name, gradient in gradients.items():
            mean, square = self._means[name], self._squares[name]
            mean += (1 - _MEAN_DECAY) * (gradient - mean)
            square += (1 - _SQUARE_DECAY) * (gradient**2 - square)
            unbiased = mean / (1 - _MEAN_DECAY**self._steps)
            scale = np.sqrt(square / (1 - _SQUARE_DECAY**self._steps)) + 1e-8
            self.weights[name] -= (_RATE * unbiased / scale).astype(np.float32)

    def _chances(
        self, weights: dict[str, torch.Tensor], options: torch.Tensor, active: torch.Tensor, preferences: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log probability of each chosen option `(n, columns)`, 0 where it does not count; mean entropy of a column."""
        import torch

        features = torch.from_numpy(self._choices.features)
        exists = torch.from_numpy(self._choices.exists)
        columns = torch.arange(options.shape[1])
        told = torch.einsum("ncf,cfh->nch", features[columns, options], weights["choice"]) * active[:, :, None]
        before = torch.cumsum(told, dim=1) - told
        hidden = torch.tanh(before + (weights["start"] + preferences @ weights["preference"])[:, None])
        heads = torch.einsum("nch,chf->ncf", hidden, weights["head"]) + weights["bias"]
        heads = heads + torch.einsum("nm,cmf->ncf", preferences, weights["direct"])
        logits = torch.einsum("ncf,ckf->nck", heads, features).masked_fill(~exists, -torch.inf)
        logs = torch.log_softmax(logits, dim=2)
        spread = -(logs.exp() * logs.masked_fill(~exists, 0.0)).sum(dim=2) * active
        chosen = logs.gather(2, options[:, :, None]).squeeze(2) * active
        return chosen, spread.sum() / active.sum().clamp(min=1)


def _fields(experience: Experience) -> list[np.ndarray]:
    return [getattr(experience, field.name) for field in fields(experience)]


def _centred(preferences: np.ndarray) -> np.ndarray:
    """Preferences as the network's inputs: 0 where all objectives weigh alike."""
    return np.asarray((2 * (preferences * preferences.shape[1] - 1)).astype(np.float32))


def _tensors(options: np.ndarray, active: np.ndarray, preferences: np.ndarray) -> tuple[torch.Tensor, ...]:
    import torch

    return torch.from_numpy(options), torch.from_numpy(active), torch.from_numpy(_centred(preferences))


def _to_text(values: np.ndarray) -> str:
    """Exact, and a fifth as long as the numbers in decimals."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _from_text(text: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4").reshape(shape).astype(np.float32)
