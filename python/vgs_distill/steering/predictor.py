"""Amortized steering: the Gramian of the parameter gradients predicted, so that most steps need one backward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .gradient_pair import Policy


def hedged(policy: Policy, gramian: Tensor, spread: Tensor) -> Tensor:
    """The weights that `policy` gives for a predicted Gramian, turned towards the side where an error costs less.

    `spread`, (): standard deviation of the logarithm of the predicted ratio of the two norms. With t the angle of the
    update between the two gradients, taken as orthogonal, the same factor on the ratio turns it further one way than
    the other: at gamma 0.8 too little vision costs more than too much. The angle t' at which a ratio that is off by two
    standard deviations costs the same both ways obeys tan 2t' = tan 2t / cosh(2 spread). The length stays.
    """
    norms = gramian.diagonal().clamp(min=0.0).sqrt().nan_to_num(0.0, 0.0, 0.0)
    lang, vis = parts = policy(gramian) * norms
    angle = torch.atan2(2 * lang * vis, torch.cosh(2 * spread.to(gramian)) * (lang - vis) * (lang + vis)) / 2
    # By way of the Gramian, so that the policy's own bound on the weights holds.
    believed = torch.where(lang * vis > 0, vis / (lang * angle.tan()), 1.0)
    scale = torch.stack([torch.ones_like(believed), believed])
    weights = policy(gramian * scale[:, None] * scale)
    return weights * parts.norm() / (weights * norms).norm().clamp(min=torch.finfo(norms.dtype).tiny)


class RunningAverage:
    """Exponential average of each component, over the entries in which it is present.

    An entry weighs 0.8 of the next one, so that about the last five decide: the ratio of one batch is too noisy, and
    ratios change while a student learns.
    """

    DECAY = 0.8

    def __init__(self, size: int, device: torch.device) -> None:
        self.value = torch.zeros(size, device=device)
        self.weight = torch.zeros(size, device=device)  # of all entries together; 0: never present

    def add(self, entry: Tensor, present: Tensor) -> None:
        value, weight = self.value.to(entry), self.weight.to(entry)
        self.weight = torch.where(present, self.DECAY * weight + 1.0, weight)
        self.value = torch.where(present, value + (entry - value) / self.weight.clamp(min=1.0), value)

    def state_dict(self) -> dict[str, list[float]]:
        return {"value": self.value.tolist(), "weight": self.weight.tolist()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.value = self.value.new_tensor(state["value"])
        self.weight = self.weight.new_tensor(state["weight"])


class GramianPredictor:
    """Predicts the Gramian of the parameter gradients from the squared norms that stand for it (`proxy.py`), (2,).

    At a refresh both are known. Their ratio, averaged over refreshes, times the proxy of a step predicts that step;
    the cosine is the average one. Where the weights must be known before the step's losses are (accumulation), the
    average proxy of the last steps takes the place of the step's own. A refresh is due every `refresh_every` steps,
    and early when the ratio of the two proxy norms, averaged over the last steps, differs by more than the factor
    `drift` from its average over refreshes. Averages of positive numbers are those of their logarithms.

    How far off the predicted ratio of the norms was at past refreshes hedges the weights of the steps to come.

    `refresh_every` 0 never measures: the proxy stands for the Gramian as it is, and before the first step both
    components are taken as equal. It is what engines that step inside `backward` (DeepSpeed) can do.

    A component that no refresh has met yet is predicted as 0; its first appearance makes a refresh due.
    """

    def __init__(self, refresh_every: int, drift: float, device: torch.device) -> None:
        self.refresh_every = refresh_every
        self.drift = drift
        self._averages = {
            "ratio": RunningAverage(2, device),  # log of (squared norm / proxy), over refreshes
            "cosine": RunningAverage(1, device),  # over refreshes
            "error": RunningAverage(1, device),  # squared, of the log of the ratio of the norms, over refreshes
            "measured": RunningAverage(2, device),  # log of the proxy, over refreshes
            "recent": RunningAverage(2, device),  # log of the proxy, over steps
        }
        self._since_refresh = 0  # 0: none yet

    @property
    def ready(self) -> bool:
        """Whether `predict` has something to go by."""
        return self.refresh_every == 0 or self._since_refresh > 0

    def refresh_due(self) -> bool:
        if self.refresh_every == 0:
            return False
        if self._since_refresh == 0 or self._since_refresh >= self.refresh_every:
            return True
        measured, recent = self._averages["measured"], self._averages["recent"]
        known = measured.weight > 0
        change = (recent.value - measured.value).diff().abs() / 2  # halved: of norms, not of squares
        drifted = known.all() & (change > math.log(self.drift))
        return bool((drifted | ((recent.weight > 0) & ~known).any()).item())

    def predict(self, proxy: Tensor | None = None) -> Tensor:
        """The predicted Gramian of the parameter gradients, (2, 2); only when `ready`. None: by the last steps'."""
        ratio, cosine, recent = (self._averages[name] for name in ("ratio", "cosine", "recent"))
        proxy = recent.value.exp() if proxy is None else proxy
        squares = ratio.value.to(proxy).exp() * proxy
        if self.refresh_every > 0:
            squares = torch.where(ratio.weight.to(proxy) > 0, squares, 0.0)
        cross = cosine.value.to(proxy) * squares.prod().sqrt()
        return torch.cat([squares[:1], cross, cross, squares[1:]]).reshape(2, 2)

    def weights(self, policy: Policy, proxy: Tensor | None = None) -> Tensor:
        """What `policy` gives for the predicted Gramian, hedged by how far off predictions were, (2,)."""
        return hedged(policy, self.predict(proxy), self._averages["error"].value.sqrt().squeeze())

    def observe(self, proxy: Tensor) -> None:
        """Take in the proxy of a step that ran on a prediction."""
        self._averages["recent"].add(*_log(proxy))
        self._since_refresh += 1

    def refresh(self, gramian: Tensor, proxy: Tensor, predicted: Tensor | None = None) -> None:
        """Take in the Gramian and the proxy of a step that measured the parameter gradients.

        `predicted`: what `predict` said of that Gramian; None for the first.
        """
        logs, present = _log(proxy)
        log_squares, measured = _log(gramian.diagonal().to(proxy))
        cosine = (gramian[0, 1] / gramian.diagonal().prod().sqrt()).to(proxy).reshape(1)
        if predicted is not None:
            log_predicted, known = _log(predicted.diagonal().to(proxy))
            error = (log_predicted - log_squares).diff().abs() / 2  # halved: of norms, not of squares
            # At most a factor e: one outlier must not leave all steps of the next refreshes to one component.
            self._averages["error"].add(error.clamp(max=1.0).square(), (measured & known).all())
        self._averages["ratio"].add(log_squares - logs, measured & present)
        self._averages["cosine"].add(cosine, torch.isfinite(cosine))
        self._averages["measured"].add(logs, present)
        self._averages["recent"].add(logs, present)
        self._since_refresh = 1

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        averages = {name: average.state_dict() for name, average in self._averages.items()}
        return {**averages, "since_refresh": self._since_refresh}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, average in self._averages.items():
            average.load_state_dict(state[name])
        self._since_refresh = int(state["since_refresh"])


def _log(squares: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms, and which of them exist."""
    usable = (squares > 0) & torch.isfinite(squares)
    return torch.where(usable, squares, 1.0).log(), usable
