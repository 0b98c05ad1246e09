"""AdaLoRA: the budget of ranks goes to the layers that need it (Zhang et al. 2023).

arXiv:2303.10512. The change of a layer is ``P L Q`` with a diagonal L; where an entry of L is
found unimportant it is set to zero. PEFT calls P, L and Q ``lora_B``, ``lora_E`` and ``lora_A``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import torch
from annotated_types import Ge, Gt, Lt
from jaxtyping import Bool, Float
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from instar.adapters.base import learnt_parts, put_in
from instar.adapters.lora import Alpha, PlacedConfig, Rank, Share, added
from instar.adapters.peft_fields import blocks_of, only, outer_path, targets_of, whole_parts_of
from instar.adapters.slots import Delta, matrix, sizes
from instar.adapters.targets import frozen
from instar.errors import UserError
from instar.model.transformer import Headed

Decay = Annotated[float, Gt(0), Lt(1)]
Steps = Annotated[int, Ge(0)]

STD = 0.02
"""Of the first P and Q, as in PEFT; L begins at zero."""

IN_PEFT = {
    "init_r": "rank",
    "target_r": "target_rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "tinit": "initial_steps",
    "tfinal": "final_steps",
    "deltaT": "every",
    "beta1": "beta1",
    "beta2": "beta2",
    "orth_reg_weight": "orthogonality",
}
"""PEFT's names of the settings."""


class AdaLoRAConfig(PlacedConfig):
    """AdaLoRA; its schedule is told in optimizer steps."""

    needs_whole = True

    method: Literal["adalora"] = "adalora"  # type: ignore[assignment]
    """AdaLoRA."""
    rank: Rank = 12
    """Every layer's rank at the start."""
    target_rank: Rank = 8
    """The mean rank at the end."""
    alpha: Alpha = 16.0
    """The product is multiplied by alpha / rank, with the rank of the start."""
    dropout: Share = 0.0
    """Share of the inputs of Q that are left out while training."""
    initial_steps: Steps = 0
    """Steps before the first rank is taken away."""
    final_steps: Steps = 0
    """Steps at the end in which the ranks stay as they are."""
    every: Annotated[int, Gt(0)] = 1
    """Steps from one allotment of ranks to the next."""
    beta1: Decay = 0.85
    """Decay of the mean sensitivity (eq. 9)."""
    beta2: Decay = 0.85
    """Decay of its mean uncertainty (eq. 10)."""
    orthogonality: Annotated[float, Ge(0)] = 0.5
    """Weight of the penalty that keeps P and Q orthogonal (eq. 4, in PEFT's form)."""

    @model_validator(mode="after")
    def _ranks_decline(self) -> Self:
        if self.target_rank > self.rank:
            raise ValueError(
                f"target_rank is {self.target_rank}, more than rank, the {self.rank} of the start"
            )
        return self

    def install(self, model: Headed, name: str, generator: torch.Generator) -> None:
        """P, L and Q at every layer that is meant."""
        for path in self.places(model):
            delta = AdaLoRA(*sizes(frozen(model, path)), self.rank, self.alpha, self.dropout)
            delta.begin(generator)
            put_in(model, path, name, delta)

    def budget(self, step: int, steps: int, layers: int) -> int:
        """How many ranks all layers together may have after a step (eq. 12, a cubic decline).

        Args:
            step: Steps done.
            steps: Steps of the whole run.
            layers: How many layers there are.
        """
        declining = max(1, steps - self.final_steps - self.initial_steps)
        left = min(max(1 - (step - self.initial_steps) / declining, 0.0), 1.0)
        first, last = self.rank * layers, self.target_rank * layers
        return int((first - last) * left**3 + last)

    def check_run(self, steps: int) -> None:
        """See that there are steps in which ranks are taken away."""
        if self.initial_steps + self.final_steps >= steps:
            raise UserError(
                f"initial_steps {self.initial_steps} and final_steps {self.final_steps} leave "
                f"nothing of {steps} steps",
                "Shorten them, or train for longer.",
            )

    def stepped(self, model: Headed, name: str, step: int, steps: int) -> Sequence[nn.Parameter]:
        """Measure what matters, and from time to time allot the ranks anew (algorithm 1)."""
        deltas = _deltas(model, name)
        if any(delta.lora_E.grad is None for delta in deltas):
            return ()  # it does not learn
        last, budget = steps - self.final_steps, self.budget(step, steps, len(deltas))
        if step < last:
            for delta in deltas:
                delta.sense(self.beta1, self.beta2)
        # The last allotment may have been missed, where a step was refused.
        too_many = step > last and sum(int(delta.kept.sum()) for delta in deltas) > budget
        declining = self.initial_steps < step < last and step % self.every == 0
        if step == last or too_many or declining:
            _allot(deltas, budget)
        elif step > last:
            for delta in deltas:
                delta.prune()
        return ()

    def penalty(self, model: Headed, name: str) -> Tensor:
        """Mean of ``||P'P - I||`` and ``||QQ' - I||`` (Frobenius) over the layers, weighted.

        Equation 4 has the squares; PEFT, like the authors' own code, has the norms.
        """
        norms = []
        for delta in _deltas(model, name):
            identity = torch.eye(len(delta.lora_A), device=delta.lora_A.device)
            norms.append(torch.linalg.norm(delta.lora_A @ delta.lora_A.mT - identity))
            norms.append(torch.linalg.norm(delta.lora_B.mT @ delta.lora_B - identity))
        return self.orthogonality * torch.stack(norms).mean()

    def settings_in(self, model: Headed, name: str) -> dict[str, Any]:
        """Which ranks each layer has kept."""
        parts = learnt_parts(model, name).items()
        kept = {path: part.speaking() for path, part in parts if isinstance(part, AdaLoRA)}
        if all(each.all() for each in kept.values()):
            return {}
        pattern = {f"{outer_path(model, p)}.lora_E": each.tolist() for p, each in kept.items()}
        return {"rank_pattern": pattern}

    def to_peft(self) -> dict[str, Any]:
        """PEFT's `AdaLoraConfig`, with the shortest run that its schedule fits in."""
        return {
            "peft_type": "ADALORA",
            "target_modules": self.targets,
            "layers_to_transform": self.layers,
            "modules_to_save": self.modules_to_save or None,
            **{theirs: getattr(self, ours) for theirs, ours in IN_PEFT.items()},
            "total_step": self.initial_steps + self.final_steps + 1,
            "rank_pattern": None,
            "bias": "none",
        }

    @classmethod
    def from_peft(cls, values: dict[str, Any]) -> Self:
        """The method that an `adapter_config.json` describes.

        Raises:
            UserError: It asks for something that this method does not have.
        """
        read = {*IN_PEFT, "target_modules", "layers_to_transform", "r", "total_step"}
        read |= {"rank_pattern", "init_lora_weights"}  # the file's own shapes tell the ranks
        if values.get("bias", "none") == "none":
            read.add("bias")
        only(values, read)
        ours = {name: values[theirs] for theirs, name in IN_PEFT.items() if theirs in values}
        first, last = ours.get("rank"), ours.get("target_rank")
        if isinstance(first, int) and isinstance(last, int):
            ours["target_rank"] = min(first, last)  # to aim higher is to take none away, in PEFT
        places = {"targets": targets_of(values), "layers": blocks_of(values)}
        whole = {"modules_to_save": whole_parts_of(values)}
        return cls.parse({"alpha": 8, **ours, **places, **whole}, "adapter_config.json")


def _deltas(model: Headed, name: str) -> list[AdaLoRA]:
    return [part for part in learnt_parts(model, name).values() if isinstance(part, AdaLoRA)]


@torch.no_grad()
def _allot(deltas: list[AdaLoRA], budget: int) -> None:
    """Keep the most important ranks of all layers, as many as the budget has."""
    scores = [delta.importance() for delta in deltas]
    together = torch.cat(scores)
    if budget >= len(together):
        return
    threshold = together.kthvalue(len(together) - budget).values
    for delta, score in zip(deltas, scores, strict=True):
        delta.kept = score > threshold
        delta.prune()


class AdaLoRA(Delta):
    """``y = W x + alpha / rank * P L Q x``.

    How important each weight is, and which ranks are kept, lies in buffers: a run that is
    resumed goes on as it was.

    Args:
        inputs: I.
        outputs: O.
        rank: r, at the start.
        alpha: What the product is multiplied by, times the rank.
        dropout: Share of Q's inputs that are left out while training.
    """

    kept: Bool[Tensor, " r"]

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(rank, inputs))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))
        self.lora_E = nn.Parameter(torch.zeros(rank, 1))
        self.scale, self.dropout = alpha / (rank + 1e-5), dropout
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool))
        for name, weight in list(self.named_parameters()):
            self.register_buffer(f"sensitivity_{name}", torch.zeros_like(weight))
            self.register_buffer(f"uncertainty_{name}", torch.zeros_like(weight))

    @torch.no_grad()
    def begin(self, generator: torch.Generator) -> None:
        """P and Q at random, L zero: nothing changes yet."""
        self.lora_A.normal_(0.0, STD, generator=generator)
        self.lora_B.normal_(0.0, STD, generator=generator)
        self.lora_E.zero_()

    def forward(self, x: Float[Tensor, "... i"], base: nn.Module) -> Float[Tensor, "... o"]:
        """The base's output, to which the product is added in place."""
        dropped = F.dropout(x, self.dropout, self.training)
        return added(base(x), dropped, self.lora_A * self.lora_E, self.lora_B, self.scale)

    def merged(self, base: nn.Module) -> tuple[Float[Tensor, "o i"], Float[Tensor, " o"] | None]:
        """``W + alpha / rank * P L Q``."""
        change = self.lora_B @ (self.lora_A * self.lora_E)
        return matrix(base) + self.scale * change, getattr(base, "bias", None)

    @torch.no_grad()
    def sense(self, beta1: float, beta2: float) -> None:
        """Follow how much each weight matters, and how sure that is (eq. 8 to 10)."""
        for name, weight in self.named_parameters():
            assert weight.grad is not None
            sensitivity = getattr(self, f"sensitivity_{name}")
            now = (weight * weight.grad).abs()
            sensitivity.lerp_(now, 1 - beta1)
            getattr(self, f"uncertainty_{name}").lerp_((now - sensitivity).abs(), 1 - beta2)

    def importance(self) -> Float[Tensor, " r"]:
        """How much each rank matters: its entry of L, and the means of its vectors (eq. 7, 11)."""
        a, b, e = (
            getattr(self, f"sensitivity_{name}") * getattr(self, f"uncertainty_{name}")
            for name in ("lora_A", "lora_B", "lora_E")
        )
        return e.squeeze(1) + a.mean(dim=1) + b.mean(dim=0)

    @torch.no_grad()
    def prune(self) -> None:
        """Silence the ranks that are not kept."""
        self.lora_E.masked_fill_(~self.kept[:, None], 0.0)

    def speaking(self) -> Bool[Tensor, " r"]:
        """The ranks that are kept, or have learnt something since they were last silenced."""
        return self.kept | (self.lora_E.detach().squeeze(1) != 0)

    def stored(self) -> dict[str, Tensor]:
        """The ranks that speak."""
        rows = self.speaking()
        a, b, e = self.lora_A.detach(), self.lora_B.detach(), self.lora_E.detach()
        return {"lora_A": a[rows], "lora_B": b[:, rows], "lora_E": e[rows]}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the ranks that spoke elsewhere; the others stay silent."""
        all_ranks = len(self.lora_E)
        ranks = len(tensors["lora_E"]) if "lora_E" in tensors else all_ranks
        if ranks < all_ranks:
            silent = all_ranks - ranks
            grown = {name: (0, 0, 0, silent) for name in ("lora_A", "lora_E")}
            grown["lora_B"] = (0, silent, 0, 0)
            tensors = {name: F.pad(t, grown[name]) for name, t in tensors.items() if name in grown}
        super().fill(tensors)
        self.kept = torch.arange(all_ranks, device=self.kept.device) < ranks
