"""DDA: debias and denoise (Wu et al. 2024)."""

from methods.base import Method
from methods.debias import Debias
from methods.denoise import Denoise


def dda(base: Method, beta: float, normalise: str, last: int | None, smoothing: str, decay: float) -> Method:
    """score = Σ_c w_c score_c − β · score_0 of the base method: see `Denoise` for w and `Debias` for β."""
    return Debias(Denoise(base, last, smoothing, decay), beta, normalise)
