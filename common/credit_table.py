"""The credit table: numbers that an update derived for each token, one row for each rollout. Runs anywhere.

docs/credit.md says what each column is. RUN/credit/step-000123.parquet holds the table of step 123.
"""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = 2  # layout of the files in RUN/credit
FLOATS = pa.list_(pa.float32())
# The columns that a learner computes. A list has one item for each token of the response; a column is null in runs that
# have no such quantity.
DERIVED_SCHEMA = pa.schema(
    [
        ("values", FLOATS),  # null without a critic
        ("kl", FLOATS),
        ("rewards", FLOATS),
        ("td_errors", FLOATS),  # null without a critic
        ("advantages", FLOATS),  # before whitening
        ("whitened_advantages", FLOATS),  # null without whitening
        ("returns", FLOATS),
        ("entropy", FLOATS),  # with "mask" null in rows that no pass reached
        ("old_logprobs", FLOATS),  # null with "mask"
        ("importance_weight", FLOATS),
        ("ratio", FLOATS),  # null in rows that no pass with gradients reached
        ("clipped", pa.list_(pa.bool_())),  # the same
        ("ends", pa.list_(pa.bool_())),  # True on the last token of each sequence
    ]
)
NULL_COLUMNS = {"values", "td_errors", "whitened_advantages", "old_logprobs"}  # null in all rows, or in none
NULL_ROWS = {"ratio", "clipped", "entropy"}  # null in any row
# The other columns are copies from the journal: the rollout's id, and values to compare with those above.
CREDIT_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        *DERIVED_SCHEMA,
        ("rollout_logprobs", FLOATS),
        ("policy_version", pa.list_(pa.int32())),
    ]
)
