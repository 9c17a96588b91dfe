"""Names of weights as `save_pretrained` writes them, which are those that engines read. Runs anywhere.

transformers keeps some weights in another form while a model is in memory: the experts of a layer are one tensor there,
and one tensor each in files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

NamedTensor = tuple[str, Callable[[], Tensor]]  # a name in memory, and a call that gives the tensor


def as_saved(model: PreTrainedModel, tensors: Iterable[NamedTensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors under the names, and in the form, that files of this kind of model have.

    Tensors are asked for one by one, or layer by layer where a file's tensor may take several of them: so no more than
    one layer is held at a time. The names depend on the model's config alone, not on how the files that it came from
    were named: learner, engines and `RUN/policy` agree without comparing files.
    """
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    # What `revert_weight_conversion` goes by; loading has left there what these files needed.
    model._weight_conversions = [entry for entry in conversions if not isinstance(entry, PrefixChange)]
    if not model._weight_conversions:
        for name, give in tensors:
            yield name, give()
        return
    for _, layer in groupby(tensors, lambda named: _layer(named[0])):
        converted = revert_weight_conversion(model, {name: give() for name, give in layer})
        while converted:
            name = next(iter(converted))
            yield name, converted.pop(name)  # released here before the next layer is asked for


def _layer(name: str) -> str:
    """What the names of one layer's weights have in common; a weight outside of the layers is its own."""
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else name
