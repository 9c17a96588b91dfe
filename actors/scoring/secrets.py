"""Keys of services: read from the driver's environment, handed to the processes that use them, written to no file.

They travel as arguments of Ray actors, which are in memory only. Environment variables of a Ray job or actor would be
shown in Ray's dashboard and written to its logs. Runs in the driver and in each reward replica.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from pydantic import SecretStr

from common.config.sources import VARIABLE, ServiceConfig
from common.errors import UserError

Secrets = Mapping[str, SecretStr]  # by the name of the variable; printing one shows asterisks


def secrets_of(cfg: ServiceConfig) -> Secrets:
    """The variables that the headers of a source name. Raises UserError for one that is not set, or that no header can
    carry."""
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
    """The text of a service, which may repeat a key, with the names of variables in place of keys."""
    for name, secret in secrets.items():
        text = text.replace(secret.get_secret_value(), f"[{name}]")
    return text
