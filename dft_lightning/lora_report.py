"""What LoRA adapts, in words."""

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Targets:
    """What has an adapter, and what has none.

    Args:
        adapted: by pattern (numbers of layers as *), how many layers or stacked parameters have one.
        left_out: by pattern, why a weight has none where all were asked for; embeddings, output head and vectors are
            not listed.
        share: of the model's weights, how many are left out.
    """

    adapted: dict[str, int]
    left_out: dict[str, str] = field(default_factory=dict)
    share: float = 0.0

    def __str__(self) -> str:
        has = f"on {sum(self.adapted.values())} layers: {_grouped(list(self.adapted))}"
        if not self.left_out:
            return has
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(name)
        none = "; ".join(f"{_grouped(names)} ({reason})" for reason, names in reasons.items())
        return f"{has}. None on {self.share:.1%} of the weights: {none}"


def patterns(reasons: dict[str, str]) -> dict[str, str]:
    """The same by patterns."""
    return {pattern(name): reason for name, reason in reasons.items()}


def pattern(name: str) -> str:
    """A name with * in place of numbers of layers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _grouped(names: list[str]) -> str:
    """Names that differ in their last part alone, written once."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        groups.setdefault(parent, []).append(leaf)
    return ", ".join(
        f"{parent}.{leaves[0]}" if len(leaves) == 1 else f"{parent}.{{{', '.join(leaves)}}}"
        for parent, leaves in groups.items()
    )
