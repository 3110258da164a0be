"""Text classifiers: a BERT from scratch with its own WordPiece vocabulary, or a pretrained encoder, fine-tuned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tasks.base import Recipe
from tasks.errors import UserError, require
from tasks.models.custom import Custom, Weights, read_weights, require_start, started
from tasks.models.pretrained import Files, require_trained

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

Tokenize = Callable[[Sequence[str]], dict[str, Tensor]]


class HeadedEncoder(nn.Module):
    """input_ids, attention_mask (B, T) -> logits (B, C) from the last state of the first token, without a pooler."""

    def __init__(self, encoder: nn.Module, width: int, classes: int, init_std: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.head.weight, std=init_std)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0])


class Classifier(nn.Module):
    """input_ids, attention_mask (B, T) -> logits (B, C), the library's own head."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.network(input_ids=input_ids, attention_mask=attention_mask).logits


@dataclass(frozen=True)
class ScratchBert:
    """BERT (Devlin et al. 2019) of any size, randomly initialised; WordPiece trained on the training texts.

    `path`: a file of weights to start from instead; vocab.txt beside it, where there is one, is the vocabulary.
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
    path: str | None = None

    def __post_init__(self) -> None:
        require(self.width % self.heads == 0, "model.width", self.width, f"a multiple of model.heads={self.heads}")
        require(self.max_length >= 4, "model.max_length", self.max_length, "4 or more")
        require_start(self.path, self.recipe)

    @cached_property
    def start(self) -> Weights | None:
        return None if self.path is None else read_weights(self.path)

    def prepare(self, texts: Sequence[str], classes: int) -> tuple[Tokenize, Callable[[], nn.Module], dict[str, Any]]:
        """The tokenizer of these training texts, the builder of θ0, and what identifies both."""
        vocabulary = vocabulary_of(texts, self.vocabulary, self.path)
        shape = (self.layers, self.width, self.heads, self.intermediate, self.max_length)
        build = partial(build_bert, *shape, self.dropout, self.init_std, len(vocabulary), classes)
        identity = {"shape": shape, "dropout": self.dropout, "init_std": self.init_std, "vocabulary": vocabulary}
        if self.start is not None:
            build = partial(_start_at, build, self.start)
            identity["start"] = self.start.fingerprint
            with torch.random.fork_rng(devices=[]):
                build()  # weights that do not fit are told before anything is trained
        return word_piece_tokenizer(vocabulary, self.max_length), build, identity


def _start_at(build: Callable[[], nn.Module], weights: Weights) -> nn.Module:
    return started(build(), weights)


def text_model(model: Any, task: str) -> "ScratchBert | PretrainedEncoder | Custom":
    """`model`, where it reads texts; else a line with what does."""
    if not isinstance(model, ScratchBert | PretrainedEncoder | Custom):
        raise UserError(
            "model", model.name, f"does not read text, which task={task} gives", allowed="an encoder, as bert_tiny"
        )
    return model


def vocabulary_of(texts: Sequence[str], size: int, path: str | None) -> list[str]:
    """WordPieces of the file vocab.txt beside the weights, a line each, in order; else those of the training texts."""
    beside = None if path is None else Path(path).expanduser().with_name("vocab.txt")
    if beside is None or not beside.is_file():
        return word_pieces(texts, size)
    try:
        pieces = beside.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("model.path", str(beside), "cannot be read as UTF-8") from error
    if pieces[:1] != [SPECIAL[0]] or len(set(pieces)) < len(pieces) or not set(SPECIAL) <= set(pieces):
        allowed = f"a piece a line, each once, {SPECIAL[0]} first, {', '.join(SPECIAL[1:])} among them"
        raise UserError("model.path", str(beside), "is no vocabulary", allowed=allowed)
    return pieces


def word_piece_tokenizer(vocabulary: Sequence[str], max_length: int) -> Tokenize:
    """Texts in small letters as [CLS] … [SEP], cut at `max_length` tokens."""
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer(vocab={piece: i for i, piece in enumerate(vocabulary)}, lowercase=True)
    tokenizer.enable_truncation(max_length)

    def tokenize(rows: Sequence[str]) -> dict[str, Tensor]:
        return padded([e.ids for e in tokenizer.encode_batch(list(rows))], pad=0)

    return tokenize


def word_pieces(texts: Sequence[str], size: int) -> list[str]:
    """A WordPiece vocabulary of these texts: pieces in a fixed order, special ones first, the same in every process.

    The trainer numbers the letters inside words ("##a") in the order of a hash table, and breaks ties by number: they
    are handed to it as special tokens, in alphabetical order, so that it has nothing to choose.
    """
    from tokenizers import BertWordPieceTokenizer

    trainer = BertWordPieceTokenizer(lowercase=True)
    normal = [trainer.normalizer.normalize_str(text) for text in texts]
    inner = sorted({f"##{letter}" for text in normal for letter in text if not letter.isspace()})
    trainer.train_from_iterator(
        texts, vocab_size=size, min_frequency=2, special_tokens=[*SPECIAL, *inner], show_progress=False
    )
    return [*SPECIAL, *sorted(set(trainer.get_vocab()) - set(SPECIAL))]


def build_bert(
    layers: int,
    width: int,
    heads: int,
    intermediate: int,
    max_length: int,
    dropout: float,
    init_std: float,
    vocabulary: int,
    classes: int,
) -> nn.Module:
    """A randomly initialised BERT classifier. Attention is eager: it must stand double differentiation."""
    from transformers import BertConfig, BertModel

    config = BertConfig(  # type: ignore[call-arg]
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=max_length,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=init_std,
        type_vocab_size=1,
        pad_token_id=0,
        attn_implementation="eager",
    )
    return HeadedEncoder(BertModel(config, add_pooling_layer=False), width, classes, init_std)


@dataclass(frozen=True)
class PretrainedEncoder:
    """A hub model at a pinned revision, or a local folder in the hub's layout (`model.path`). Safetensors only."""

    name: str
    hub: str
    revision: str
    path: str | None
    max_length: int
    dtype: str
    recipe: Recipe

    @property
    def files(self) -> Files:
        return Files(self.name, self.hub, self.revision, self.path, instead="bert_tiny")

    def prepare(self, texts: Sequence[str], classes: int) -> tuple[Tokenize, Callable[[], nn.Module], dict[str, Any]]:
        """The model's own tokenizer, the builder (a new head on pretrained weights), and what identifies both."""
        tokenizer = self.files.tokenizer("tokenizer.json or vocab.txt beside", "pad", "padding token", "encoders")

        def tokenize(rows: Sequence[str]) -> dict[str, Tensor]:
            ids = tokenizer(list(rows), truncation=True, max_length=self.max_length)["input_ids"]
            return padded(ids, pad=tokenizer.pad_token_id)

        build = partial(load_encoder, self, classes)
        build()  # a model that cannot be loaded is told before anything is trained
        return tokenize, build, {**self.files.fingerprint(), "max_length": self.max_length}


def load_encoder(spec: PretrainedEncoder, classes: int) -> nn.Module:
    """Pretrained weights below, a head drawn from torch's random state above."""
    from transformers import AutoModelForSequenceClassification

    network, facts = spec.files.load(AutoModelForSequenceClassification, num_labels=classes, output_loading_info=True)
    require_trained(list(facts["missing_keys"]), spec.files, spec.recipe.epochs)
    return Classifier(network)


def padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """Token ids as input_ids (N, T) filled up with `pad` on the right, and their attention_mask."""
    width = max(len(r) for r in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}
