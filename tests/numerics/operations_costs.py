"""What each family of rules sends, in closed form, and where it ends: the part of docs/operations.md that no code says.

`harness_bounds.py` holds the same forms as arithmetic; the cases of a family are judged against it.
"""

from __future__ import annotations

from dataclasses import dataclass

NONE = "nothing"
WINDOW = "positions that the outputs of a rank read and it does not own × the other dims of its part"
SUMS = "one to three numbers for each element of the result × 2 (ranks − 1) / ranks, where a reduced dim is split"
SWAP = "the local part × (ranks − 1) / ranks, there and back (all-to-all)"
CHANNELS = "a split of channels moves to where the plan has it, all-to-all; if that dim is split already: gathered"


@dataclass(frozen=True)
class Cost:
    """Elements that a rank sends forward (backward sends as many), and what is gathered, reported or refused."""

    sends: str
    fallback: str = NONE


COSTS: dict[str, Cost] = {
    "adaptive": Cost(f"{WINDOW}; where outputs are few, their partial sums or maxima"),
    "attention": Cost("keys and values (or the second set of points) × (ranks − 1): every query needs them"),
    "backward": Cost(NONE),
    "channels": Cost(f"{WINDOW}; pixel shuffles whose chunks line up send nothing", CHANNELS),
    "composed": Cost("what the functions that it is made of send"),
    "conv": Cost(
        f"{WINDOW}: [a·s − p, (b − 1)·s − p + d·(k − 1) + 1) less the own chunk; by filters (images whose weights "
        "outnumber the input) the part × (ranks − 1), backward what others own of the input",
        CHANNELS,
    ),
    "conv_transpose": Cost(
        f"{WINDOW}: ⌈(a + p − d·(k − 1)) / s⌉ … ⌊(b − 1 + p) / s⌋ less the own chunk; nothing for k = s", CHANNELS
    ),
    "dimwise": Cost(
        f"nothing where the named dim is whole; else {SWAP}",
        "no other dim to move the split to: gathered, but for lookups (the positions and as many elements travel, or a "
        "line that is shorter)",
    ),
    "extremes": Cost(SUMS),
    "fourier": Cost(SWAP, "no other dim to move a split to: gathered"),
    "fractional": Cost("windows begin anywhere, so space is made whole", "split space or channels: gathered"),
    "indexing": Cost(f"nothing where the indexed dims are whole; else {SWAP}", "selection by a mask: gathered"),
    "join_channels": Cost("nothing: channels in half precision, on the parts themselves", "as all concatenations"),
    "joins": Cost("positions whose place in the result belongs to another rank × the other dims"),
    "linear": Cost("nothing; a split last dim as in matmul"),
    "loss": Cost("one number for each loss, to the other ranks", "a split class dim of class losses is gathered"),
    "many": Cost(NONE),
    "margins": Cost("one number for each loss, to the other ranks", "a split dim of classes is gathered"),
    "matmul": Cost("a split contraction: the result × 2 (ranks − 1) / ranks, once, when the sum is needed"),
    "norm": Cost(
        "2 numbers for each channel (batch), or sample and group, forward and backward, to the ranks that share it; of "
        "split channels the running ones, forward",
        CHANNELS,
    ),
    "on_parts": Cost("nothing: elementwise between two rules, on the parts themselves", "as all elementwise work"),
    "pad": Cost("positions that padding repeats or moves to another rank's chunk × the other dims"),
    "pointwise": Cost("nothing; operands split in different ways: one moves to the other's layout"),
    "pool": Cost(WINDOW),
    "random": Cost(NONE, "random operators without a rule: refused"),
    "reduce": Cost(SUMS),
    "resize": Cost("the one or two positions that each output reads, where another rank owns them × the other dims"),
    "rms_norm": Cost("one number for each row, forward and backward"),
    "sample": Cost(
        "the window of the input that a rank's points fall into, less the own chunk; two numbers a dim", CHANNELS
    ),
    "scans": Cost("one plane for each rank"),
    "selection": Cost("256 counts for each byte of the dtype"),
    "slices": Cost(
        "positions whose place in the result belongs to another rank, with what a step leaves out between them"
    ),
    "special": Cost(NONE, "pickling: refused"),
    "sync_norm": Cost("as batch norm"),
    "tables": Cost("counts, one for each bin; otherwise nothing"),
    "triangles": Cost("positions that meet another rank's; triangles nothing"),
    "unfold": Cost(WINDOW),
    "unpool": Cost("the planes of values that fall into another rank's part; two numbers for each plane", CHANNELS),
    "views": Cost(
        "nothing where chunks line up; else the elements that change rank", "splits that no dim can carry: made whole"
    ),
    "weighted": Cost("the interval of positions that the outputs of a rank read and it does not own × the other dims"),
}
