"""Weights of a separate critic that do not train (learner.critic_frozen). Runs in the driver and in every rank."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from fnmatch import fnmatchcase

from torch import nn

from common.errors import UserError

ATTENTION = "attention"
# Names that models give to their attention modules: self_attn, attn, attention, self_attention, linear_attn. A norm
# such as post_attention_layernorm does not match.
_ATTENTION = re.compile(r"(?:^|[._])(?:attn|attention)\.")


def frozen_names(names: Iterable[str], setting: str | Sequence[str]) -> set[str]:
    """The names of a network's parameters that the setting freezes. Raises UserError for a pattern that matches no
    name."""
    known = list(names)
    frozen: set[str] = set()
    for pattern in [setting] if isinstance(setting, str) else setting:
        if pattern == ATTENTION:
            found = {name for name in known if _ATTENTION.search(name)}
        else:
            found = {name for name in known if fnmatchcase(name, pattern)}
        if not found:
            near = sorted(known, key=lambda name: -_likeness(pattern, name))[:3]
            raise UserError(
                f"learner.critic_frozen ({pattern}) matches no parameter of the critic's network; similar names: "
                f'{", ".join(near)}; give "{ATTENTION}", or a pattern such as "*.mlp.*"'
            )
        frozen |= found
    return frozen


def _likeness(pattern: str, name: str) -> float:
    """Similarity of the pattern, without its stars, to the most similar part of the name, 0 to 1."""
    wanted, parts = [part for part in pattern.split(".") if part.strip("*")], name.split(".")
    windows = [parts[i : i + len(wanted)] for i in range(len(parts))]
    return max(SequenceMatcher(None, ".".join(wanted), ".".join(window)).ratio() for window in windows)


def freeze(network: nn.Module, setting: str | Sequence[str] | None) -> None:
    """Freezes parameters of a critic's network. Raises UserError as `frozen_names` does."""
    parameters = dict(network.named_parameters())
    for name in frozen_names(parameters, setting) if setting else ():
        parameters[name].requires_grad_(False)
