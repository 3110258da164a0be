"""A user's mistake, said in one line: the key, the value, what is allowed, what to do. The program exits with 2."""

from collections.abc import Iterable


class UserError(Exception):
    """`key=value: problem; allowed: ...; hint`, always a single line."""

    def __init__(
        self,
        key: str,
        value: object = None,
        problem: str = "is not possible",
        *,
        allowed: Iterable[object] | str | None = None,
        hint: str | None = None,
    ) -> None:
        self.key, self.value = key, value
        parts = [f"{key}={value} {problem}" if value is not None else f"{key} {problem}"]
        if allowed is not None:
            parts.append(f"allowed: {allowed if isinstance(allowed, str) else ', '.join(str(a) for a in allowed)}")
        if hint is not None:
            parts.append(hint)
        super().__init__(" ".join("; ".join(parts).split()))


def require(condition: bool, key: str, value: object, allowed: str, hint: str | None = None) -> None:
    """Raises `UserError` unless `condition` holds."""
    if not condition:
        raise UserError(key, value, "is not possible", allowed=allowed, hint=hint)
