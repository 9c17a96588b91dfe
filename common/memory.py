"""Units and approximate sizes of memory. Runs anywhere."""

MIB, GIB = 1 << 20, 1 << 30
# Memory of one token while its rollout waits for the learner: id, two log-probabilities, version, text.
BYTES_PER_TOKEN = 20
