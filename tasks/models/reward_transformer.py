"""Reward models with a causal transformer: the two answers of a preference pair in one pass over their prompt.

A pair is one row of T tokens, [prompt | first | second]. The state of a token depends on those before it only, so the
prompt's are the same for both answers: they are computed once. The tokens of the second answer see the prompt and
themselves, not the first answer, and are counted on from the end of the prompt. The rewards are those of two separate
passes over [prompt | first] and [prompt | second].
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tasks.base import Recipe
from tasks.data.preferences import sides
from tasks.errors import UserError, require
from tasks.models.encoder import padded, word_pieces
from tasks.models.lora import Lora
from tasks.models.pretrained import Files, require_trained

SHORTEST = 8  # tokens of a prompt and one answer
SAME = 1e-3  # of the largest state: what reading a pair in one pass may change

Encode = Callable[[Sequence[str]], dict[str, Tensor]]
Tokenize = Callable[[Sequence[str]], list[list[int]]]


class RewardNetwork(nn.Module):
    """input_ids, attention_mask, sides (B, T) -> rewards (B, 2): `head` of the state of each answer's last token.

    `sides`: 0 prompt, 1 first, 2 second. `body`: a causal transformer of the library, states (B, T, d).
    """

    def __init__(self, body: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, sides: Tensor) -> Tensor:
        return self.head(self.ends(input_ids, attention_mask, sides))[..., 0]

    def ends(self, input_ids: Tensor, attention_mask: Tensor, sides: Tensor) -> Tensor:
        """States of the answers' last tokens, (B, 2, d)."""
        sees, positions, last = layout(attention_mask, sides)
        dtype = self.head.weight.dtype
        mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)
        states = self.body(
            input_ids=input_ids, attention_mask=mask[:, None], position_ids=positions, use_cache=False
        ).last_hidden_state
        return states.gather(1, last[..., None].expand(-1, -1, states.shape[-1]))


def layout(attention_mask: Tensor, sides: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which token (B, T, 1) sees which (B, 1, T); positions (B, T); places of the answers' last tokens (B, 2).

    All see themselves, padding too, so that no softmax is empty; nobody else sees padding.
    """
    real, place = attention_mask > 0, torch.arange(sides.shape[1], device=sides.device)
    shared = real & (sides == 0)
    same = sides[:, :, None] == sides[:, None, :]
    before = place[:, None] >= place
    sees = (before & real[:, None, :] & (shared[:, None, :] | same)) | (place[:, None] == place)
    first = (real & (sides == 1)).sum(1)
    positions = (place - first[:, None] * (sides == 2)) * real
    last = torch.stack([shared.sum(1) + first, real.sum(1)], 1) - 1
    return sees, positions, last


@dataclass(frozen=True)
class RewardTransformer(ABC):
    """What all reward transformers have. `max_length`: tokens of a prompt and one answer; of longer ones the end of the
    prompt and the beginning of the answers are read."""

    name: str
    max_length: int
    dtype: str
    recipe: Recipe

    def __post_init__(self) -> None:
        require(self.max_length >= SHORTEST, "model.max_length", self.max_length, f"{SHORTEST} or more")

    @abstractmethod
    def prepare(self, texts: Sequence[str]) -> tuple[Encode, Callable[[], nn.Module], dict[str, Any]]:
        """The encoder of pairs that these training pairs make, the builder of θ0, and what identifies both."""


@dataclass(frozen=True)
class ScratchReward(RewardTransformer):
    """GPT-2 (Radford et al. 2019) of any size, randomly initialised; WordPiece trained on the training pairs."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    dropout: float
    init_std: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.width % self.heads == 0, "model.width", self.width, f"a multiple of model.heads={self.heads}")
        hint = "nothing would be trained"
        require(self.recipe.epochs > 0, "model.recipe.epochs", self.recipe.epochs, "1 or more", hint)

    def prepare(self, texts: Sequence[str]) -> tuple[Encode, Callable[[], nn.Module], dict[str, Any]]:
        from tokenizers import BertWordPieceTokenizer

        pieces = word_pieces([part for text in texts for part in sides(text)], self.vocabulary)
        number = {piece: i for i, piece in enumerate(pieces)}
        tokenizer = BertWordPieceTokenizer(vocab=number, lowercase=True)

        def tokenize(rows: Sequence[str]) -> list[list[int]]:
            return [found.ids for found in tokenizer.encode_batch(list(rows), add_special_tokens=False)]

        pair = Pair([number["[CLS]"]], number["[SEP]"], number["[PAD]"], self.max_length)
        shape = (self.layers, self.width, self.heads, self.max_length)
        build = partial(build_gpt, *shape, self.dropout, self.init_std, len(pieces))
        identity = {"shape": shape, "dropout": self.dropout, "init_std": self.init_std, "vocabulary": pieces}
        return partial(encode, tokenize, pair), build, identity


def build_gpt(
    layers: int, width: int, heads: int, max_length: int, dropout: float, init_std: float, vocabulary: int
) -> nn.Module:
    """Attention is eager: it must stand double differentiation."""
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(  # type: ignore[call-arg]
        vocab_size=vocabulary,
        n_positions=max_length,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        initializer_range=init_std,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    head = nn.Linear(width, 1, bias=False)
    nn.init.normal_(head.weight, std=init_std)
    return RewardNetwork(GPT2Model(config), head)


@dataclass(frozen=True)
class PretrainedReward(RewardTransformer):
    """A causal language model, or a reward model, of the hub at a pinned revision, or of a local folder in the hub's
    layout (`path`). Safetensors only. A head that it lacks is drawn. `lora`: adapters are trained, and the head, and
    nothing else."""

    hub: str | None
    revision: str | None
    path: str | None
    lora: Lora | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is None and (self.hub is None or self.revision is None):
            hint = "a branch moves: give the commit"
            raise UserError("model.revision", self.revision, "is needed with model.hub", hint=hint)

    @property
    def files(self) -> Files:
        return Files(self.name, self.hub or "", self.revision or "", self.path, instead="reward_gpt")

    def prepare(self, texts: Sequence[str]) -> tuple[Encode, Callable[[], nn.Module], dict[str, Any]]:
        without = "an end token, at which a reward is read"
        tokenizer = self.files.tokenizer("tokenizer.json beside", "eos", without, "causal language models")
        tokenizer.model_max_length = 10**9  # it warns of long texts, which are cut here

        def tokenize(rows: Sequence[str]) -> list[list[int]]:
            return tokenizer(list(rows), add_special_tokens=False)["input_ids"]

        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        end = tokenizer.eos_token_id
        pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        encoder = partial(encode, tokenize, Pair(start, end, pad, self.max_length))
        with torch.random.fork_rng(devices=[]):
            network = load_reward(self)  # what cannot be loaded, or read so, is told before anything is trained
        require_positions(network.body, self.max_length)
        require_one_pass(network, encoder([max(texts, key=len)]), self.files.place()["name"])
        identity = {**self.files.fingerprint(), "max_length": self.max_length}
        if self.lora is not None:
            identity["lora"] = vars(self.lora)
        return encoder, partial(load_reward, self), identity


def load_reward(spec: PretrainedReward) -> RewardNetwork:
    """Pretrained weights; what they lack, a head or adapters, is drawn from torch's random state."""
    from transformers import AutoModelForSequenceClassification

    network, facts = spec.files.load(AutoModelForSequenceClassification, num_labels=1, output_loading_info=True)
    head = getattr(network, "score", None)
    if not isinstance(head, nn.Linear):
        problem = f"is a {type(network.base_model).__name__}, which does not read from left to right"
        raise UserError("model.path", spec.files.place()["name"], problem, allowed="causal language models")
    require_trained(list(facts["missing_keys"]), spec.files, spec.recipe.epochs)
    return RewardNetwork(network.base_model if spec.lora is None else spec.lora.adapt(network.base_model), head)


def require_positions(body: nn.Module, max_length: int) -> None:
    """Refuses more tokens than the model has positions for."""
    most = getattr(body.config, "max_position_embeddings", None)
    if isinstance(most, int):
        allowed = f"at most {most}, the positions of this model"
        require(max_length <= most, "model.max_length", max_length, allowed)


@torch.no_grad()
def require_one_pass(network: RewardNetwork, pair: dict[str, Tensor], name: str) -> None:
    """Refuses a model that reads a `pair` (a long one tells more) in one pass otherwise than its two sides in two, as
    one does that looks back over a window, or counts distances its own way."""
    ids, side = pair["input_ids"], pair["sides"]
    alone = [ids[:, (side[0] == 0) | (side[0] == s)] for s in (1, 2)]
    try:
        expected = torch.cat([network.body(input_ids=one, use_cache=False).last_hidden_state[:, -1] for one in alone])
        found = network.ends(**pair)[0]
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise UserError("model.path", name, f"cannot read two answers in one pass ({reason})") from error
    if not (found - expected).abs().max() <= SAME * expected.abs().max():
        problem = "reads two answers in one pass otherwise than one by one"
        raise UserError("model.path", name, problem, allowed="causal transformers with full attention, as Llama, GPT-2")


@dataclass(frozen=True)
class Pair:
    """How a pair becomes a row: `start` in front of the prompt, `end` behind each answer."""

    start: list[int]
    end: int
    pad: int
    max_length: int

    def row(self, prompt: list[int], first: list[int], second: list[int]) -> tuple[list[int], list[int]]:
        """Tokens and sides. Where a prompt and an answer are too long together, an answer keeps what the prompt leaves
        it, at least half; then the prompt keeps its last tokens, as many as the longer answer leaves it."""
        room = self.max_length - len(self.start) - 1
        most = max(room // 2, room - len(prompt))
        answers = [answer[:most] for answer in (first, second)]
        left = room - max(map(len, answers))
        kept = [*self.start, *prompt[max(0, len(prompt) - left) :]]
        row, side = list(kept), [0] * len(kept)
        for number, answer in enumerate(answers, start=1):
            row += [*answer, self.end]
            side += [number] * (len(answer) + 1)
        return row, side


def encode(tokenize: Tokenize, pair: Pair, texts: Sequence[str]) -> dict[str, Tensor]:
    """Pairs as input_ids, attention_mask and sides, each (N, T)."""
    read = [tokenize(column) for column in zip(*map(sides, texts), strict=True)]
    rows, side = zip(*(pair.row(*parts) for parts in zip(*read, strict=True)), strict=True)
    return {**padded(rows, pad=pair.pad), "sides": padded(side, pad=0)["input_ids"]}
