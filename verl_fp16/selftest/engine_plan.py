"""What the engine's test does, in numbers that its ranks and its judgement share."""

FAULTY, SAVED = 4, 6
"""The update with the planted overflow, and the one after which a checkpoint is saved, counted from 1."""
LOSS_SCALE = 1024.0
"""The first one: low enough that no other update of the small model overflows."""
SEQUENCES = 8
"""Of a rank, in two micro-batches."""
STRATEGIES = ("fsdp", "fsdp2")
