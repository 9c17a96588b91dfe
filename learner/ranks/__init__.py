"""What the ranks of a trainer share: group, collectives, checkpoint, optimizer."""
