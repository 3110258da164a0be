"""Causal language models of questions and answers: a small GPT from scratch, or a pretrained one, fine-tuned."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tasks.base import Recipe
from tasks.errors import UserError, require
from tasks.models.custom import require_start
from tasks.models.encoder import padded, word_pieces
from tasks.models.pretrained import Files
from tasks.objectives.language_model import NO_TARGET

PAD, UNKNOWN, BEGIN, END = "[PAD]", "[UNK]", "[BOS]", "[EOS]"
WORDS = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Reader:
    """Texts as ids. `begin` stands before every sequence, `end` after it; `size` ids in all."""

    encode: Callable[[Sequence[str]], list[list[int]]]
    begin: tuple[int, ...]
    end: int
    pad: int
    size: int


class NextToken(nn.Module):
    """input_ids (B, T) -> logits (B, T, V), of position t what is said of the token after it. Padding stands on the
    right, where a causal model does not see it: the mask is not read."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.network(input_ids=input_ids, use_cache=False).logits


@dataclass(frozen=True)
class ScratchGPT:
    """GPT-2 (Radford et al. 2019) of any size, randomly initialised, its embedding the output layer too.

    Its vocabulary: every word of the corpus, in small letters, where there are no more than `vocabulary`; else
    WordPieces of the corpus.
    """

    name: str
    layers: int
    width: int
    heads: int
    intermediate: int
    vocabulary: int
    max_length: int
    dropout: float
    init_std: float
    dtype: str
    recipe: Recipe

    def __post_init__(self) -> None:
        require(self.width % self.heads == 0, "model.width", self.width, f"a multiple of model.heads={self.heads}")
        require(self.max_length >= 8, "model.max_length", self.max_length, "8 or more")
        require_start(None, self.recipe)

    def prepare(self, texts: Sequence[str]) -> tuple[Reader, Callable[[], nn.Module], dict[str, Any]]:
        """The reader of this corpus, the builder of θ0, and what identifies both."""
        words = Counter(word for text in texts for word in WORDS.findall(text.lower()))
        if len(words) + 4 <= self.vocabulary:
            known = [PAD, UNKNOWN, BEGIN, END, *sorted(words)]
            reader = _word_reader(known)
        else:
            known = [*word_pieces(texts, self.vocabulary), BEGIN, END]
            reader = _piece_reader(known)
        shape = (self.layers, self.width, self.heads, self.intermediate, self.max_length)
        build = partial(build_gpt, *shape, self.dropout, self.init_std, len(known))
        identity = {"shape": shape, "dropout": self.dropout, "init_std": self.init_std, "vocabulary": known}
        return reader, build, identity


@dataclass(frozen=True)
class PretrainedGPT:
    """A causal language model of the hub at a pinned revision, or a local folder in the hub's layout (`model.path`).
    Safetensors only."""

    name: str
    hub: str
    revision: str
    path: str | None
    max_length: int
    dtype: str
    recipe: Recipe

    def prepare(self, texts: Sequence[str]) -> tuple[Reader, Callable[[], nn.Module], dict[str, Any]]:
        """The model's own tokenizer, the builder, and what identifies both; `texts` change neither."""
        tokenizer = self.files.tokenizer("tokenizer.json or vocab.json beside", "eos", "an end of text", "causal LMs")
        end = tokenizer.eos_token_id

        def encode(rows: Sequence[str]) -> list[list[int]]:
            return tokenizer(list(rows), add_special_tokens=False)["input_ids"]

        begin = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
        build = partial(_load, self)
        network = build()  # a model that cannot be loaded is told before anything is trained
        with torch.no_grad():
            size = network(torch.tensor([[end]]), torch.ones(1, 1, dtype=torch.long)).shape[-1]
        reader = Reader(encode, begin, end, end if tokenizer.pad_token_id is None else tokenizer.pad_token_id, size)
        return reader, build, {**self.files.fingerprint(), "max_length": self.max_length}

    @property
    def files(self) -> Files:
        return Files(self.name, self.hub, self.revision, self.path, instead="authors_gpt")


def build_gpt(
    layers: int,
    width: int,
    heads: int,
    intermediate: int,
    max_length: int,
    dropout: float,
    init_std: float,
    vocabulary: int,
) -> nn.Module:
    """A randomly initialised GPT-2. Attention is eager: it must stand double differentiation."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(  # type: ignore[call-arg]
        vocab_size=vocabulary,
        n_positions=max_length,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_inner=intermediate,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        initializer_range=init_std,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    return NextToken(GPT2LMHeadModel(config))


def _load(spec: PretrainedGPT) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return NextToken(spec.files.load(AutoModelForCausalLM))


def _word_reader(known: Sequence[str]) -> Reader:
    place = {word: i for i, word in enumerate(known)}

    def encode(rows: Sequence[str]) -> list[list[int]]:
        return [[place.get(word, place[UNKNOWN]) for word in WORDS.findall(row.lower())] for row in rows]

    return Reader(encode, (place[BEGIN],), place[END], place[PAD], len(known))


def _piece_reader(known: Sequence[str]) -> Reader:
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer(vocab={piece: i for i, piece in enumerate(known)}, lowercase=True)

    def encode(rows: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in tokenizer.encode_batch(list(rows), add_special_tokens=False)]

    return Reader(encode, (known.index(BEGIN),), known.index(END), known.index(PAD), len(known))


def answered(
    reader: Reader, pairs: Sequence[tuple[str, str]], max_length: int
) -> tuple[dict[str, Tensor], Tensor, int]:
    """[begin] question answer [end] of each pair: inputs (N, T), the targets (N, T) of each position's next token,
    NO_TARGET but for those of the answer and its end, and how many rows are cut at `max_length` tokens. A question that
    leaves no room for its answer is refused."""
    asked = reader.encode([question for question, _ in pairs])
    said = reader.encode([f" {answer}" for _, answer in pairs])
    whole = [[*reader.begin, *q, *a, reader.end] for q, a in zip(asked, said, strict=True)]
    rows = [row[: max_length + 1] for row in whole]
    inputs = padded([row[:-1] for row in rows], reader.pad)
    targets = torch.full(inputs["input_ids"].shape, NO_TARGET)
    for i, (row, q) in enumerate(zip(rows, asked, strict=True)):
        before = len(reader.begin) + len(q)
        if before >= len(row):
            problem = f"leaves no room for an answer to a question of {len(q)} tokens"
            raise UserError("model.max_length", max_length, problem, allowed="more, where the model has the positions")
        targets[i, max(before, 1) - 1 : len(row) - 1] = torch.tensor(row[max(before, 1) :])
    return inputs, targets, sum(len(row) > max_length + 1 for row in whole)
