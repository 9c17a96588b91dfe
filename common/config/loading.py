"""Configuration files: a TOML file and `key=value` settings to a tree of `common/config.py`, or every fault in it.

Names of files and model directories in it are looked up in the current directory first, then next to the TOML file.
"""

from __future__ import annotations

import glob
import os
import re
import tomllib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from common.config.base import Root, Section
from common.config.sources import SOURCE_KINDS, RewardSource
from common.errors import UserError

AnyRoot = TypeVar("AnyRoot", bound=Root)

_DEEPEST = 8  # sections that a key is in; more than any has
_LONGEST_PATH = 4096  # bytes, Linux's own limit; matching a longer pattern can take minutes
_LONGEST_SHOWN = 200  # characters of the user's text in a message


def load_config(path: Path, overrides: Iterable[str], root: type[AnyRoot], *, keep_relative: bool = False) -> AnyRoot:
    """The tree of kind `root` in `path` with `key=value` overrides applied. Raises UserError with every fault found.

    Names of files are made absolute, unless `keep_relative`: the current directory will be another one on a cluster."""
    given = tuple(overrides)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows begin it with a byte order mark
        for override in given:
            _apply(tree, override)
        directories = [Path.cwd(), path.absolute().parent]
        if keep_relative:  # others do not travel to the cluster
            directories = [directory for directory in directories if directory.is_relative_to(Path.cwd())]
        _find_files(tree, directories, keep_relative)
        return root.model_validate(tree)
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist; shipped ones lie in deploy/configs/") from None
    except OSError as error:
        raise UserError(f"config {path} cannot be read ({error.strerror}); name a .toml file") from None
    except RecursionError:
        raise UserError(
            f"config file {path} has brackets or sections within each other too deeply; no setting is"
        ) from None
    except ValidationError as error:
        faults = [(fault, _explain(fault, root)) for fault in error.errors()]
        lines = "\n".join(f"  {text}" for _, text in faults)
        raise UserError(f"{_at_fault(path, given, faults)} {len(faults)} fault(s):\n{lines}") from None
    except ValueError as error:  # TOML's and UTF-8's own errors, NUL in the path, a number of 5,000 digits
        raise UserError(f"config file {path} is not valid TOML: {error}") from None


def describe(section: type[Section], prefix: str = "", *, skip: Container[str] = ()) -> Iterator[tuple[str, ...]]:
    """(key, type, default, meaning) of every field not in `skip`, depth first, in the order of the file."""
    for name, field in section.model_fields.items():
        if name in skip:
            continue
        if (nested := _section(field)) is not None:
            yield from describe(nested, f"{prefix}{name}.")
            continue
        yield prefix + name, _type_name(field), _default(field), " ".join((field.description or "").split())
        if name == "sources":  # judges are described by them too
            described: set[str] = set()
            kinds: list[type[RewardSource]] = [RewardSource, *SOURCE_KINDS.values()]
            for source in kinds:
                yield from describe(source, f"{prefix}{name}[].", skip=described)
                described |= source.model_fields.keys()


def _find_files(tree: Any, directories: Sequence[Path], keep_relative: bool) -> None:
    """Makes names of model directories and data files that are found in one of the directories absolute: they are
    opened by processes that may have been started elsewhere, and again when the run is resumed. Other names stay."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict):
            _find_files(value, directories, keep_relative)
        elif isinstance(value, list):
            for entry in value:
                _find_files(entry, directories, keep_relative)
        elif key in ("path", "model", "policy") and isinstance(value, str):
            tree[key] = absolute_if_directory(value, directories)
        elif key in ("train", "heldout", "source") and isinstance(value, str):
            found = _absolute_if_file(value, directories)
            tree[key] = _relative_if_here(found, value) if keep_relative else found


def absolute_if_directory(name: str, directories: Sequence[Path] = (Path(),)) -> str:
    """A model directory as every process finds it; any other name, such as one of the hub, as it is."""
    paths = (os.path.join(directory, os.path.expanduser(name)) for directory in directories)
    return next((os.path.realpath(path) for path in paths if name and os.path.isdir(path)), name)


def _absolute_if_file(name: str, directories: Sequence[Path]) -> str:
    """A data file, or a pattern that such files match, as every process finds it; any other name as it is."""
    pattern = os.path.expanduser(name)
    has_magic = glob.has_magic(pattern) and "\0" not in pattern and len(pattern) <= _LONGEST_PATH
    for directory in directories:
        if name and os.path.exists(path := os.path.join(directory, pattern)):
            return os.path.abspath(path)
        if has_magic and glob.glob(pattern, root_dir=directory, recursive=True):
            return os.path.join(glob.escape(os.path.abspath(directory)), pattern)
    return name


def _relative_if_here(found: str, given: str) -> str:
    """The file in relation to the current directory, if it is in that and was not given by an absolute name."""
    absolute = os.path.isabs(os.path.expanduser(given)) or not Path(found).is_relative_to(Path.cwd())
    return found if absolute else os.path.relpath(found)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r} must read key=value, such as ppo.clip_eps=0.1")
    *sections, leaf = key.split(".")
    if len(sections) > _DEEPEST:
        raise UserError(f"override {shortened(override)}: no setting is so many sections deep")
    try:
        override.encode()
        value = tomllib.loads(f"value = {text}")["value"]
    except UnicodeEncodeError:
        raise UserError(f"override {override!r} is not valid UTF-8; write it in a UTF-8 terminal") from None
    except RecursionError:
        raise UserError(f"override {shortened(override)} has brackets within each other too deeply") from None
    except ValueError:
        value = text  # a bare word is a string
    for name in sections:
        if isinstance(tree, list) and re.fullmatch("[0-9]{1,4}", name) and int(name) < len(tree):
            tree = tree[int(name)]  # reward.sources.0.weight
        elif isinstance(tree, dict):
            tree = tree.setdefault(name, {})
        else:
            break
    if not isinstance(tree, dict):
        override = _without_secrets(override)
        raise UserError(f"override {override!r}: {leaf} would be set inside a value that is no section of settings")
    tree[leaf] = value


def _at_fault(path: Path, overrides: Sequence[str], faults: Sequence[tuple[Any, str]]) -> str:
    """The beginning of the message: what has the faults, the file, or settings of the command line, or both."""
    blamed = [[text for text in overrides if _is_about(text, fault, told)] for fault, told in faults]
    given = " ".join(
        _without_secrets(text) for text in dict.fromkeys(overrides) if any(text in part for part in blamed)
    )
    if not given:
        return f"config {path} has"
    if all(blamed) and all(fault["loc"] for fault, _ in faults):
        return f"the command line ({given}) has"
    return f"config {path} with {given} has"


def _is_about(override: str, fault: Any, told: str) -> bool:
    """Whether a fault, as it is told, is one of the key that an override sets, or breaks a rule that this key is in."""
    key = override.partition("=")[0]
    if not (place := ".".join(_keys(fault["loc"]))):
        return re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", told) is not None
    return f"{place}.".startswith(f"{key}.")


def _without_secrets(override: str) -> str:
    """An override as a message can show it: addresses and headers of services may hold passwords and keys."""
    key, _, text = override.partition("=")
    return f"{key}=..." if "{" in text or "://" in text or ".headers." in key else shortened(override)


def _shown(value: Any) -> str:
    """A value at fault; of a table its keys only, for the same reason."""
    if isinstance(value, dict):
        return shortened(f"{{{', '.join(map(_visible, value))}}}")
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return shortened(re.sub("://[^/]*@", "://", repr(value)))


def shortened(text: str) -> str:
    """For a message."""
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]} ..."


def _without_its_middle(text: str) -> str:
    """For a message that has values in it: long ones are between what is wrong and what helps."""
    return text if len(text) <= 4 * _LONGEST_SHOWN else f"{text[: 2 * _LONGEST_SHOWN]} ... {text[-_LONGEST_SHOWN:]}"


def _visible(key: str) -> str:
    """A key as a message can show it, also one that is empty or holds line ends."""
    return key if key.isprintable() and key.strip() == key != "" else repr(key)


def _keys(loc: Sequence[str | int]) -> list[str]:
    """The keys in the file of what pydantic locates: behind the index of a reward source it puts the source's kind,
    which the file does not have."""
    return [str(part) for k, part in enumerate(loc) if not (k and isinstance(loc[k - 1], int))]


def _explain(fault: Any, root: type[Section]) -> str:
    """One pydantic error in the words of the file: key, what is wrong, remedy."""
    key = shortened(".".join(map(_visible, _keys(fault["loc"]))))
    match fault["type"]:
        case "extra_forbidden":
            *parents, leaf = (part for part in fault["loc"])
            close = get_close_matches(str(leaf), _names_at(parents, root), n=1, cutoff=0.5)
            if not any(isinstance(part, int) for part in parents):  # perhaps one of another section
                places = [known for known, *_ in describe(root) if known.endswith(f".{leaf}") and "[" not in known]
                close = [*close, *places] if parents else places or close
            hint = (
                f"did you mean {' or '.join(close)}?" if close else f"known here: {', '.join(_names_at(parents, root))}"
            )
            return f"{key}: unknown key; {hint}"
        case "missing":
            return f"{key}: required and missing"
        case "value_error":
            told = "\n".join(map(_without_its_middle, str(fault["ctx"]["error"]).split("\n")))
            return f"{key}: {told}" if key else told
        case _:
            return f"{key} = {_shown(fault['input'])}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _names_at(parents: list[Any], root: type[Section]) -> list[str]:
    section = root
    for before, part in zip([None, *parents], parents):
        if isinstance(before, int):  # the kind of a reward source, which pydantic puts behind its index
            section = SOURCE_KINDS[part]
        elif isinstance(part, str):
            section = _section(section.model_fields[part]) or section
    return list(section.model_fields)


def _section(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, or may hold."""
    kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _type_name(field: FieldInfo) -> str:
    bounds = [
        f"{symbol} {value}"
        for item in field.metadata
        for name, symbol in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if (value := getattr(item, name, None)) is not None
    ]
    kind = field.annotation
    if getattr(kind, "__origin__", None) is tuple:
        text = "list"
    elif getattr(kind, "__origin__", None) is Literal:
        text = " | ".join(kind.__args__)  # type: ignore[union-attr]
    elif getattr(kind, "__origin__", None) is Mapping:
        text = "table"
    elif isinstance(kind, type) and not hasattr(kind, "__origin__"):
        text = {"int": "integer", "float": "number", "str": "text", "bool": "true | false"}.get(
            kind.__name__, kind.__name__
        )
    else:
        args = [a for a in getattr(kind, "__args__", ()) if a is not type(None)]
        if len(args) == 1:  # or none
            return _type_name(FieldInfo.from_annotation(args[0]))
        text = {int: "integer", float: "number", str: "text"}.get(args[0] if args else kind, "list")  # type: ignore[arg-type]
    return " ".join([text, *bounds])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None:
        return "none"
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
