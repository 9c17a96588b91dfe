"""The turns of an episode, as the page has them. Runs anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from common.turns import response_mask
from deploy.report.page import json_text
from deploy.report.token_numbers import short

LONGEST_INFO = 1_000  # characters of the `info` of a turn
LONGEST_UNSEEN = 2_000  # characters of what the environment said after the last token
BYTES_PER_TURN = 40  # places and reward


@dataclass(frozen=True)
class Turns:
    """One response. Without an environment it has no turns, and all its tokens were sampled."""

    rows: Sequence[Mapping[str, Any]]  # the turns that the environment has answered, with the fields of `Turn`
    length: int  # tokens of the response

    @property
    def sampled(self) -> int:
        """Tokens that the policy sampled."""
        if not self.rows:
            return self.length
        return int(response_mask(self.length, ((row["end"], row["next_start"]) for row in self.rows)).sum())

    @property
    def count(self) -> int:
        """Turns of the policy: the last one may have no answer. 0 without an environment."""
        return len(self.rows) + bool(self.rows and self.rows[-1]["next_start"] < self.length)

    @property
    def size(self) -> int:
        """Bytes in the page, without those of the sampled tokens."""
        said = self.length - self.sampled
        texts = len(json_text(self.unseen))
        return 6 * said + texts + sum(BYTES_PER_TURN + len(json_text(_info(row))) for row in self.rows)

    @property
    def unseen(self) -> str:
        """The contents of the environment's last answer, which has no tokens because the episode is over. Each content
        comes after its role, unless that is `user`."""
        if not self.rows or self.rows[-1]["end"] < self.length:
            return ""
        messages = json.loads(self.rows[-1]["observation"])
        texts = (
            message["content"] if message["role"] == "user" else f"{message['role']}: {message['content']}"
            for message in messages
        )
        return "\n".join(texts)[:LONGEST_UNSEEN]

    def detail(self) -> dict[str, Any]:
        """The data of the token view. Each turn has its end, the start of the next one, its reward, and its `info` as
        JSON text ("" if there is none). If a new context begins after the turn, 1 follows, or 2 if a sequence ends
        there too. `unseen` is left out if it is empty."""
        turns = [[row["end"], row["next_start"], short(row["reward"]), _info(row), *_context(row)] for row in self.rows]
        return {"turns": turns} | ({"unseen": unseen} if (unseen := self.unseen) else {})


def turns_of(rows: Sequence[Mapping[str, Any]] | None, length: int) -> Turns:
    return Turns(rows or (), length)


def turn_rows(table: pa.Table) -> list[Sequence[Mapping[str, Any]] | None]:
    """The turns of each row of a journal's step."""
    if "turns" not in table.column_names or table["turns"].null_count == table.num_rows:
        return [None] * table.num_rows
    return table["turns"].to_pylist()


def _context(row: Mapping[str, Any]) -> list[int]:
    return [2 if row["ends"] else 1] if row["new_context"] else []


def _info(row: Mapping[str, Any]) -> str:
    info = row["info"] or ""
    return "" if info == "{}" else info[:LONGEST_INFO]
