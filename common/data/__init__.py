"""The records that users bring, prompts and preference pairs, read and tokenised. Runs in the driver."""
