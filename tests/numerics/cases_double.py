"""What double backward is tried on: every operation of the other cases, and ways of use that need second gradients.

The ordinary run takes `CORE`, one mesh of four ranks for each, and the scenarios; the full run takes all.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import scenarios_double
import torch
from cases import OPERATIONS, ranks_of
from harness import Case
from harness_double import Double
from harness_driver import Key, run_keys
from scenario_kit import Scenario

_CORE = """
conv1d_k3_p1 conv1d_k7_d3 conv2d_k4_same conv2d_k3_d3_s2 conv2d_groups conv2d_depthwise conv2d_k3_reflect
conv2d_k3_replicate conv2d_k3_circular conv2d_functional_scaled_weight conv3d_k3_p1 conv3d_k2_s3_gap conv3d_k5_p2
conv3d_k7_p3_halo_wider_than_shard conv3d_k3_d3_halo_wider_than_shard conv3d_k3_size5_empty_shards
conv3d_k135_mixed conv3d_parameter_used_twice
conv_transpose1d_k2_s2 conv_transpose2d_k3_s2_p1_op1 conv_transpose3d_k4_s2_p1 conv_transpose3d_k1_s2_gap
max_pool1d_k3_s2_p1 max_pool2d_k2 max_pool2d_k3_s2_p1_even max_pool3d_k3_s2_p1 avg_pool2d_k3_s2_p1
avg_pool2d_k3_p1_excluded lp_pool2d_p3_k3_s2_ceil adaptive_avg_pool2d_1x1 adaptive_max_pool2d_1x1
batch_norm3d_train batch_norm3d_eval batch_norm3d_size5_empty_shards group_norm_3d instance_norm3d_affine
layer_norm_over_space layer_norm_channels_last rms_norm3d_last_3 local_response_norm2d
interpolate2d_bicubic_down upsample_bicubic pad_reflect_3d pad_replicate pad_circular pad_negative
loss_cross_entropy loss_cross_entropy_smoothing loss_bce_logits loss_bce loss_mse loss_l1 loss_huber
loss_user_dice loss_focal loss_kl
softmax_depth log_softmax_width softmax_channels logsumexp_depth mean_depth var_space std_channels_kept norm_all
norm_space amax_space prod_channels
linear_features linear_channels_last squeeze_excite classifier_head einsum_channels
permute flatten_space reshape_depth_to_channels view_channels cat_depth stack index_crop_all index_every_second
flip_depth select_depth expand repeat_channels along_glu
elementwise_chain elementwise_activations elementwise_broadcast in_place_after_conv masked_fill parameter_scales
thin_stack few_loss grid_sample2d_learned
"""
CORE = frozenset(_CORE.split())


def _taken(case: Case) -> bool:
    """Differentiable, without random numbers, and in fp64 throughout."""
    fp64 = case.dtype == torch.float64 and case.tolerance is None
    return case.grad and fp64 and case.reference == "plain"


def _plans(case: Case) -> tuple[str, ...]:
    """One mesh of four ranks, another one for each case; the samples also on 2, 3 and 8 ranks."""
    plans = [plan for plan in case.all_plans() if ranks_of((case.name, plan)) > 1]
    four = [plan for plan in plans if ranks_of((case.name, plan)) == 4]
    chosen = four[zlib.crc32(case.name.encode()) % len(four)]
    return (chosen, *(plan for plan in plans if plan not in four))


def is_ordinary(key: Key) -> bool:
    """Whether a case belongs to the ordinary run: the core on four ranks, half of it on others, every scenario."""
    name, plan = key
    if name not in _DOUBLED:
        return True
    sample = plan not in ("d2h2w2", "n2d2h2") and zlib.crc32(name.encode()) % 2 == 0
    return name in CORE and (ranks_of(key) == 4 or sample)


DOUBLE = [Double(case, _plans(case)) for case in OPERATIONS if _taken(case)]
_DOUBLED = {case.name for case in DOUBLE}
KEYS: list[Key] = [(case.name, plan) for case in [*DOUBLE, *scenarios_double.SCENARIOS] for plan in case.all_plans()]


@lru_cache(maxsize=1)
def _table() -> dict[str, Double | Scenario]:
    return {case.name: case for case in [*DOUBLE, *scenarios_double.SCENARIOS]}


def lookup(name: str) -> Double | Scenario:
    return _table()[name]


def worker(keys: list[Key], folder: str) -> None:
    """What every rank of a launch runs."""
    run_keys(lookup, keys, folder)
