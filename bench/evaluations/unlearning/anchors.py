"""The two ends of every scale: nothing is done, or all is done again."""

from dataclasses import dataclass

from bench.evaluations.unlearning.base import Context, Unlearned, Unlearner


@dataclass(frozen=True)
class Nothing(Unlearner):
    """θ0 as it is."""

    @property
    def changes(self) -> bool:
        return False

    def unlearn(self, context: Context) -> Unlearned:
        return Unlearned(((0, context.start),))


@dataclass(frozen=True)
class Retrain(Unlearner):
    """A model trained on R from the explained initialisation, in a new order: the gold standard, as one of the rows. It
    is left out of the reference that it is judged by."""

    @property
    def is_gold(self) -> bool:
        return True

    def unlearn(self, context: Context) -> Unlearned:
        assert context.retrained is not None
        return Unlearned(((0, context.start), (1, context.retrained())))
