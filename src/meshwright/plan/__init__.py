"""The decision: the plan value and the arithmetic of its intervals. Imports no torch.distributed."""
