"""Converts weights from their form in memory to names and shapes of files, which engines read. Runs anywhere.

transformers keeps some weights in another form in memory. For example, all experts of a layer are one tensor there, but
one tensor each in files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

NamedTensor = tuple[str, Callable[[], Tensor]]  # name in memory, and a function that returns the tensor


def as_saved(model: PreTrainedModel, tensors: Iterable[NamedTensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors with the names and shapes that `save_pretrained` writes.

    It requests one tensor at a time; if the model has conversions, all tensors of a layer at a time. So it holds at
    most one layer. Names depend on the model's config alone, not on the names in the files that were loaded:
    learner, engines and `RUN/policy` agree without comparing files.
    """
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    # `revert_weight_conversion` reads this attribute. Loading set it to the conversions of the files it read.
    model._weight_conversions = [entry for entry in conversions if not isinstance(entry, PrefixChange)]
    if not model._weight_conversions:
        for name, give in tensors:
            yield name, give()
        return
    for _, layer in groupby(tensors, lambda named: _layer(named[0])):
        converted = revert_weight_conversion(model, {name: give() for name, give in layer})
        while converted:
            name = next(iter(converted))
            yield name, converted.pop(name)  # popped, so that it is freed before the next layer


def _layer(name: str) -> str:
    """The common prefix of one layer's names. A weight outside the layers forms a group by itself."""
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else name
