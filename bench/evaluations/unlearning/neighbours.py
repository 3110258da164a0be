"""The retained examples that are most like the forget set: forgetting spills over to them first."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.evaluations.unlearning.base import Context
from tasks.base import Examples

SIZE = 128


def nearest(context: Context) -> list[int]:
    """As many retained rows of the training set as are forgotten (all, where there are fewer): those of largest cosine
    with any forgotten row, each row represented by what θ0's last module reads, the mean over its tokens."""
    model = context.network(context.start)
    forget, retain = (represented(model, part) for part in (context.forget, context.retain))
    closest = (retain @ forget.T).amax(1)
    first = torch.argsort(closest, descending=True, stable=True)[: len(forget)].tolist()
    return sorted(context.retain_rows[i] for i in first)


@torch.no_grad()
def represented(model: nn.Module, examples: Examples) -> Tensor:
    """Unit vectors (n, d), float64."""
    seen: list[Tensor] = []
    leaves = [m for m in model.modules() if not list(m.children()) and list(m.parameters())]

    def note(_: nn.Module, given: Sequence[Tensor]) -> None:
        seen[:] = [given[0]] if given and given[0].is_floating_point() else seen

    handles = [leaf.register_forward_pre_hook(note) for leaf in leaves]
    found: list[Tensor] = [torch.empty(0)] * len(examples)
    device = next(model.parameters()).device
    try:
        for index in examples.batches(SIZE):
            inputs = examples.batch(index).to(device).inputs
            model(**inputs)
            for i, row in zip(index.tolist(), pooled(seen[0], inputs.get("attention_mask")), strict=True):
                found[i] = row
    finally:
        for handle in handles:
            handle.remove()
    rows = torch.stack(found).double().cpu()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def pooled(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, ..., d) -> (B, d), without what is padding."""
    if x.ndim == 3 and mask is not None and mask.shape == x.shape[:2]:
        weight = mask.to(x.dtype)[..., None]
        return (x * weight).sum(1) / weight.sum(1)
    return x.flatten(1, -2).mean(1) if x.ndim > 2 else x
