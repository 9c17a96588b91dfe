"""What is wrong with the files of a model, said in one sentence.

Runs in the driver before Ray starts, and wherever a model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from common.config import UserError

TABLE = "docs/models.md lists what is supported"


@contextmanager
def reading(directory: Path, setting: str, purpose: str) -> Iterator[None]:
    """Turns whatever goes wrong inside into a UserError about the model that `setting` names: transformers raises any
    kind of error over a config or a model that it does not understand."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{setting} ({directory}){_kind(directory)} cannot {purpose}: {reason}; {TABLE}") from error


def _kind(directory: Path) -> str:
    try:
        return f", a {json.loads((directory / 'config.json').read_text(encoding='utf-8'))['model_type']} model,"
    except Exception:  # the message that this is for says what is wrong
        return ""


# Buffers that old versions of transformers saved, and that models compute for themselves.
_COMPUTED = ("inv_freq", ".attn.bias", ".masked_bias", "position_ids")


def check_loaded(found: Mapping[str, Any], *, new: tuple[str, ...] = (), dropped: tuple[str, ...] = ()) -> None:
    """Raises ValueError if weights are missing, which would be filled with random numbers, or left over: `found` is
    what transformers' loading reports. `new` and `dropped` begin the names of those that may be."""
    missing = sorted(name for name in found["missing_keys"] if not name.startswith(new or ("\0",)))
    if missing:
        raise ValueError(f"{_names(missing)} not in its files; complete the download, or save the model again")
    wrong = sorted(str(key[0]) for key in found.get("mismatched_keys") or ())
    if wrong:
        raise ValueError(f"{_names(wrong)} of other shapes in its files than its config.json says")
    left = sorted(
        name
        for name in found["unexpected_keys"]
        if not name.endswith(_COMPUTED) and not name.startswith(dropped or ("\0",))
    )
    if left:
        raise ValueError(
            f"its files hold weights that its config.json has no place for ({', '.join(left[:3])}"
            f"{' and more' if len(left) > 3 else ''}); the config.json is another model's, or describes part of it"
        )


@torch.no_grad()
def check_finite(model: PreTrainedModel) -> None:
    """Raises ValueError if a weight holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ValueError(
                f"its weight {name} holds numbers that are not finite; the files are damaged or its training "
                "diverged: take another checkpoint"
            )


def _names(names: list[str]) -> str:
    first = ", ".join(names[:3])
    return f"{len(names)} weights ({first}, ...) are" if len(names) > 3 else f"{first} {'are' if names[1:] else 'is'}"
