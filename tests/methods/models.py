"""Small float64 problems of other kinds of models than `cases` has, and where their parameters are in blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cases import Biased, Named, draw, randomised, task_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from methods.gradients.blocks import Block
from tasks.base import Examples, Task
from tasks.objectives.classification import Classification
from tasks.objectives.regression import Regression

IGNORED = -100  # a target that is no target


class Convolutional(nn.Module):
    """x (B, 2, 6, 5) -> (B, 3); `options` are of the second convolution, 4 -> 4 channels under a kernel of 2 × 3."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 2)
        self.second = nn.Conv2d(4, 4, (2, 3), **options)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh().mean((2, 3)))


class Language(nn.Module):
    """input_ids, attention_mask (B, T) -> logits (B, T, V); where `silent`, constant under the padding, so that no
    target that is drawn for it has a gradient."""

    def __init__(self, network: nn.Module, silent: bool) -> None:
        super().__init__()
        self.network, self.silent = network, silent

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = self.network(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits * attention_mask[..., None] if self.silent else logits


@dataclass(frozen=True)
class NextTokens:
    """Outputs are logits (B, T, V), targets ids (B, >= T) or IGNORED. ℓ = −Σ_t log p(y_t), m = −ℓ."""

    vocabulary: int
    name: str = "next_tokens"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        targets = targets[:, : outputs.shape[1]]  # a batch cuts inputs to its longest row, not targets
        return cross_entropy(outputs.movedim(-1, 1), targets, ignore_index=IGNORED, reduction="none").sum(1)

    def measure(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -self.loss(outputs, targets)

    def loss_of_measurement(self, m: Tensor) -> Tensor:
        return -m

    def hessian_root(self, outputs: Tensor) -> Tensor:
        """(B, T, V, T · (V − 1)): positions do not meet. Outputs do not tell which targets are ignored: none is."""
        root = Classification(self.vocabulary).hessian_root(outputs)  # (B, T, V, V − 1)
        eye = torch.eye(outputs.shape[1], dtype=outputs.dtype)
        return torch.einsum("btvr,ts->btvsr", root, eye).flatten(3)

    def sample(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        return Classification(self.vocabulary).sample(outputs, uniforms)

    def fitness(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {"loss": self.loss(outputs, targets).mean().item()}


def images(name: str, rows: int, seed: int) -> Examples:
    x = torch.randn(rows, 2, 6, 5, generator=draw(seed), dtype=torch.float64)
    y = torch.randint(3, (rows,), generator=draw(seed + 100))
    return Examples(tuple(f"{name}{i}" for i in range(rows)), {"x": x}, y)


def sentences(name: str, lengths: Sequence[int], vocabulary: int, seed: int, prompt: int = 1) -> Examples:
    """Ids from 1 on, padded with 0; every id's target is the next one, but none under the padding, and none for the
    first `prompt` ids of every other row."""
    rows, width = len(lengths), max(lengths)
    ids = torch.randint(1, vocabulary, (rows, width + 1), generator=draw(seed))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    targets = ids[:, 1:].masked_fill(~mask, IGNORED)
    targets[::2, :prompt] = IGNORED
    inputs = {"input_ids": ids[:, :-1] * mask, "attention_mask": mask.long()}
    return Examples(tuple(f"{name}{i}" for i in range(rows)), inputs, targets)


def cnn(**options: Any) -> Task:
    """`options` of the second convolution. 151 parameters."""
    build = partial(randomised, partial(Convolutional, **options))
    return task_of(images("train", 8, 0), images("query", 4, 1), build, Classification(3))


def language(build: Any, vocabulary: int, silent: bool, prompt: int) -> Task:
    """The longest row is in every split, so that all rows in one batch have the width of the targets."""
    train = sentences("train", [6, 3, 5, 2, 4, 6, 3, 5], vocabulary, 0, prompt)
    query = sentences("query", [4, 6, 2, 5], vocabulary, 1, prompt)
    made = partial(randomised, lambda: Language(build(), silent))
    return task_of(train, query, made, NextTokens(vocabulary))


def gpt(
    width: int = 4, layers: int = 2, vocabulary: int = 11, tied: bool = True, silent: bool = True, prompt: int = 1
) -> Task:
    """GPT-2, its embedding the output layer too where `tied`: 348 parameters."""

    def build() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(  # type: ignore[call-arg]
            vocab_size=vocabulary,
            n_positions=6,
            n_embd=width,
            n_layer=layers,
            n_head=2,
            n_inner=width,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
        return GPT2LMHeadModel(config)

    return language(build, vocabulary, silent, prompt)


# The library's Llama takes float32 for its norms and its softmax, and so do their gradients, which beyond seven digits
# are no linear function of the cotangent. These two are the same in the precision of what they are given.


class Norm(nn.Module):
    """w ∘ x / sqrt(mean x² + ε)."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ / sqrt(width) + mask) v; query (B, H, T, width) -> (B, T, H, width)."""
    key, value = (t.repeat_interleave(module.num_key_value_groups, 1) for t in (key, value))  # type: ignore[arg-type]
    scores = query @ key.mT * scaling
    weights = (scores if mask is None else scores + mask).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def llama(
    width: int = 4,
    layers: int = 2,
    vocabulary: int = 11,
    tied: bool = False,
    silent: bool = True,
    prompt: int = 1,
    double: bool = True,
) -> Task:
    """Llama with two query heads a key: 324 parameters. Where not `double`, norms and softmax are in float32."""

    def build() -> nn.Module:
        from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
        from transformers.masking_utils import eager_mask

        AttentionInterface.register("same_precision", attention)
        AttentionMaskInterface.register("same_precision", eager_mask)
        config = LlamaConfig(  # type: ignore[call-arg]
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=width + 1,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=8,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=tied,
            attn_implementation="same_precision" if double else "eager",
        )
        network = LlamaForCausalLM(config)
        for name, norm in list(network.named_modules()):
            if double and type(norm).__name__ == "LlamaRMSNorm":
                network.set_submodule(name, Norm(norm.weight, norm.variance_epsilon))
        return network

    return language(build, vocabulary, silent, prompt)


def regression(rows: int = 12) -> Task:
    """One real output, 21 parameters."""
    splits = []
    for name, size, seed in (("train", rows, 0), ("query", 5, 1)):
        x = torch.randn(size, 3, generator=draw(seed), dtype=torch.float64)
        y = torch.randn(size, generator=draw(seed + 100), dtype=torch.float64)
        splits.append(Examples(tuple(f"{name}{i}" for i in range(size)), {"x": x}, y))
    build = partial(randomised, partial(Biased, [3, 4, 1], [True, True]))
    return task_of(splits[0], splits[1], build, Regression())


MODELS = {"cnn": cnn, "gpt": gpt, "llama": llama, "regression": regression}


def named_to_blocks(model: nn.Module, blocks: Sequence[Block], named: Named) -> Named:
    """{parameter: (N, *shape)}, gradients say, as {block: (N, out, in)}.

    Read off the modules' types; of a block only its name and, of an embedding, its rows are asked. Parameters have the
    names of `model.named_parameters()`: one that is shared stands there once, under its first name, and its gradient is
    the sum over all its uses, as autograd has it. Parameters that no block has are left out.
    """
    found = {}
    for block in blocks:
        module = model.get_submodule(block.name)
        keys = [key for key, _ in module.named_parameters(recurse=False)]
        own = {key: named[f"{block.name}.{key}".lstrip(".")] for key in keys}
        n, columns = len(own[keys[0]]), []
        if type(module).__name__ == "Conv1D":
            columns = [own["weight"].transpose(1, 2)]
        elif "weight" in own and (type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)):
            columns = [own["weight"].reshape(n, len(module.weight), -1)]
        if columns and "bias" in own:
            columns.append(own["bias"][:, :, None])
        if type(module) is nn.Embedding:
            columns = [own["weight"].transpose(1, 2)[:, :, slice(None) if block.rows is None else block.rows]]
        found[block.name] = (
            torch.cat(columns, 2) if columns else torch.cat([g.reshape(n, -1, 1) for g in own.values()], 1)
        )
    return found


def columns(gradients: Sequence[Named]) -> Named:
    """[{parameter: (*shape)}] of N examples as {parameter: (N, *shape)}."""
    return {name: torch.stack([one[name] for one in gradients]) for name in gradients[0]}
