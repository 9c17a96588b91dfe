"""Keys of services: read from the driver's environment, given to the processes that use them, never written to a file.

They are passed as arguments of Ray actors, which exist in memory only. Ray would show the environment variables of a
job or actor in its dashboard and write them to its logs. Runs in the driver and in each reward replica.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from pydantic import SecretStr

from common.config.sources import VARIABLE, ServiceConfig
from common.errors import UserError

Secrets = Mapping[str, SecretStr]  # by the name of the variable; printing one shows asterisks


def secrets_of(cfg: ServiceConfig) -> Secrets:
    """Values of the variables that the headers of a source name. Raises UserError if one is not set, or has characters
    that a header must not have."""
    found: dict[str, SecretStr] = {}
    for header, value in cfg.headers.items():
        if (named := VARIABLE.fullmatch(value)) is None:
            continue
        secret, setting = os.environ.get(named["name"], ""), f"reward source {cfg.name}: headers.{header}"
        if not secret:
            raise UserError(
                f"{setting} is read from the environment variable {named['name']}, which is not set here; export it in "
                "the shell that starts the run (for a submitted run: before `ray start` on the head node)"
            )
        if not (secret.isascii() and secret.isprintable()):
            raise UserError(
                f"{setting}: the environment variable {named['name']} holds characters that no header may have, such "
                "as a line end; set it again without them"
            )
        found[named["name"]] = SecretStr(secret)
    return found


def request_headers(headers: Mapping[str, str], secrets: Secrets) -> dict[str, str]:
    """The headers with their keys filled in."""
    filled = {}
    for header, value in headers.items():
        named = VARIABLE.fullmatch(value)
        if named is not None:
            secret = secrets[named["name"]].get_secret_value()
            value = f"{named['scheme']} {secret}" if named["scheme"] else secret
        filled[header] = value
    return filled


def without_secrets(text: str, secrets: Secrets) -> str:
    """The text with every key replaced by the name of its variable. A service may repeat a key in its answer. Call this
    before the text is cut: a part of a key would not be found."""
    for name, secret in secrets.items():
        key = secret.get_secret_value()
        for form in (key, json.dumps(key)[1:-1], repr(key)[1:-1]):  # JSON and Python escape quotes and backslashes
            text = text.replace(form, f"[{name}]")
    return text
