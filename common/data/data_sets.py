"""Reads records of Hugging Face data sets: from directories, and from the hub. Runs in the driver.

The package `datasets` is imported only when a source needs it. Since version 4 it runs no Python code of a data set.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from common.data.file_formats import Located
from common.data.json_values import cause, json_values
from common.data.source_names import ParsedSource, is_heldout
from common.errors import UserError
from common.optional_packages import require
from common.plain_text import one_line

_EXAMPLE = "as in ?config=main&split=train"


def data_set_rows(named: ParsedSource, source: str, setting: str) -> Iterator[Located]:
    """Every row of one split, in order. Without the option `split` it is `test` for held-out records, else `train`."""
    require("datasets", "datasets", f"{setting} ({source})")
    split = named.options.get("split") or ("test" if is_heldout(setting) else "train")
    number = 0
    try:
        for number, row in enumerate(_rows(named, split), 1):
            where = f"{source}, row {number}"
            yield where, json_values(where, row)
    except UserError:
        raise
    except Exception as error:  # the package, its readers and the hub's client raise many types
        after = f" after row {number}" if number else ""
        remedy = (
            f"check the name, and name config, split and revision {_EXAMPLE}&revision=main; without access to the hub, "
            "download the data set and give its directory"
            if named.kind == "hub"
            else f"name config and split {_EXAMPLE}; a directory must be one that save_to_disk has written, or have "
            "Parquet, JSON or CSV files"
        )
        reason = one_line(cause(error), 400)
        raise UserError(f"{setting} ({source}), split {split}, cannot be read{after} ({reason}); {remedy}") from error


def _rows(named: ParsedSource, split: str) -> Iterable[dict[str, Any]]:
    import datasets

    if named.kind == "hub":
        options = named.options
        # Without the prefix a directory of this name would be read instead.
        path, config = f"hf://datasets/{named.name}", options.get("config")
        return datasets.load_dataset(path, config, split=split, revision=options.get("revision"))
    with _no_progress_bars():
        if not any(os.path.isfile(os.path.join(named.name, file)) for file in ("dataset_dict.json", "state.json")):
            return datasets.load_dataset(os.path.abspath(named.name), named.options.get("config"), split=split)
        if "config" in named.options:
            raise ValueError("save_to_disk wrote this directory, so it has no configs")
        saved = datasets.load_from_disk(named.name)
        if isinstance(saved, datasets.DatasetDict):
            return _part(saved, split)
        # The directory has one data set, which may have been a split.
        return _part({str(saved.split or "train"): saved}, split) if "split" in named.options else saved


def _part(splits: dict[str, Any], split: str) -> Iterable[dict[str, Any]]:
    """A split of a saved data set, or a part of one, such as train[:90%]. Raises ValueError if it does not exist."""
    from datasets import ReadInstruction, concatenate_datasets

    parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Local data sets are read quickly, and bars would disturb the screen."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()
