"""Low-rank adapters: the pretrained weights stay as they are, small matrices beside them are trained."""

from dataclasses import dataclass

from torch import nn

from tasks.errors import UserError, require

EVERY = "all-linear"
CONV1D = "Conv1D"  # GPT-2's linear layer, whose weight is (in, out)


@dataclass(frozen=True)
class Lora:
    """W x + (alpha / rank) B A x beside each target's W (out, in), which is frozen (Hu et al. 2022, eq. 3).

    A (rank, in) is drawn, B (out, rank) starts at 0; `dropout` on the way into A, in training only. `targets`: names of
    linear layers, as the last part of their full name has it, or all-linear.
    """

    rank: int
    alpha: float
    dropout: float
    targets: str | tuple[str, ...]

    def __post_init__(self) -> None:
        require(self.rank >= 1, "model.lora.rank", self.rank, "1 or more")
        require(self.alpha > 0, "model.lora.alpha", self.alpha, "above 0")
        require(0 <= self.dropout < 1, "model.lora.dropout", self.dropout, "0 <= dropout < 1")
        if isinstance(self.targets, str) and self.targets != EVERY:
            object.__setattr__(self, "targets", (self.targets,))
        elif not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))

    def adapt(self, body: nn.Module) -> nn.Module:
        """The same network with adapters drawn from torch's random state; they alone require a gradient."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            problem, hint = "needs the package peft", "pip install 'attribution-bench[peft]', or take model.lora=null"
            raise UserError("model.lora", f"rank {self.rank}", problem, hint=hint) from error

        names = linear_layers(body)
        unknown = [] if self.targets == EVERY else [t for t in self.targets if t not in names]
        if unknown:
            raise UserError("model.lora.targets", ",".join(unknown), "is no linear layer", allowed=[EVERY, *names])
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=names if self.targets == EVERY else list(self.targets),
            fan_in_fan_out=any(type(m).__name__ == CONV1D for m in body.modules()),
        )
        return inject_adapter_in_model(config, body)


def linear_layers(body: nn.Module) -> list[str]:
    """Last parts of the names of all linear layers, each once."""
    linear = (name for name, m in body.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == CONV1D)
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
