"""What truncated sampling does to the figures of an evaluation. Runs in the driver."""

from __future__ import annotations

from common.config.actors import SamplingConfig


def truncation_warnings(sampling: SamplingConfig, samples: int) -> list[str]:
    """Sentences for the user; none without truncation."""
    texts = []
    truncated = {
        "top_p": sampling.top_p < 1,
        "top_k": sampling.top_k > 0,
        "min_new_tokens": sampling.min_new_tokens > 0,
    }
    if names := [f"sampling.{name}" for name, is_set in truncated.items() if is_set]:
        texts.append(
            f"the reference ignores {' and '.join(names)}, so the KL of every policy, also of the base, "
            "includes what they change"
        )
    if sampling.top_k == 1 and samples > 1:
        texts.append(
            f"sampling.top_k=1 always takes the likeliest token, so all {samples} answers to a prompt are the same, up "
            "to rounding; set sampling.top_k=0, or --samples 1"
        )
    return texts
