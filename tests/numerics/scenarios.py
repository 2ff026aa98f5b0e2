"""Ways of use that are more than one call: each returns errors by name, and raises where a promise is broken."""

from __future__ import annotations

import scenarios_backward as backward
import scenarios_corners as corners
import scenarios_flow as flow
import scenarios_history as history
import scenarios_use as use
from scenario_kit import Scenario

SCENARIOS = [
    Scenario("checkpoint_reentrant", flow.recompute(True)),
    Scenario("checkpoint_not_reentrant", flow.recompute(False)),
    Scenario("checkpoint_dropout", flow.recompute_dropout),
    Scenario("autocast_bf16", flow.autocast_bf16, limit=0.0),
    Scenario("module_bf16", flow.module_bf16, limit=0.0),
    Scenario("norms_in_halves", flow.norms_in_halves, plans=("n2d2", "d4", "d2h2", "d8", "d3"), limit=0.0),
    Scenario("channels_last_3d", flow.channels_last, plans=("d4", "h4", "d2h2", "n2d2"), limit=0.0),
    Scenario("no_grad_eval", flow.no_grad_eval),
    Scenario("inference_mode", flow.inference_mode),
    Scenario("inference_then_training", flow.inference_then_training),
    Scenario("autograd_grad", flow.autograd_grad, plans=("d4", "d2h2", "n2d2")),
    Scenario("no_sync", flow.no_sync, plans=("d4", "d2h2", "n2d2")),
    Scenario("accumulate", flow.accumulate, plans=("d4", "n2d2")),
    Scenario("retain_graph", flow.two_losses_one_graph),
    Scenario("optimizer_before", use.optimizer_before, plans=("d4", "n2d2"), limit=1e-8),
    Scenario("gradient_clipping", use.gradient_clipping),
    Scenario("state_dict_round_trip", use.state_dict_round_trip),
    Scenario("deepcopy", use.copied),
    Scenario("from_local", use.from_local, plans=("d4", "d2h2", "n2d2")),
    Scenario("two_plans", use.two_plans, plans=("d4", "d2h2")),
    Scenario("outside_the_module", use.outside_the_module),
    Scenario("other_thread", use.other_thread),
    Scenario("frozen_part", use.frozen_part),
    Scenario("unused_branch", use.unused_branch),
    Scenario("shared_weights", use.shared_weights),
    Scenario("random_calls", use.random_calls, plans=("d4", "d2h2", "n2d2")),
    Scenario("report_rows", use.report_rows),
    Scenario("target_forms", use.functional_loss_target_forms, plans=("d4", "n2d2")),
    Scenario("full_tensor_loss", corners.full_tensor_loss, plans=("d4", "d2h2", "n2d2")),
    Scenario("to_local_loss", corners.to_local_loss, plans=("d4", "d2h2", "n2d2")),
    Scenario("shard_of_a_leaf", corners.shard_of_a_leaf, plans=("d4", "d2h2", "n2d2")),
    Scenario("plain_weight", corners.plain_weight, plans=("d4", "d2h2", "n2d2")),
    Scenario("own_generators", corners.own_generators),
    Scenario("second_order", backward.second_order),
    Scenario("moving_average", corners.moving_average, limit=1e-8),
    Scenario("gradient_surgery", backward.gradient_surgery),
    Scenario("optimizers", corners.optimizers, limit=1e-8),
    Scenario("two_modules", corners.two_modules),
    Scenario("conversion_after", corners.conversion_after),
    Scenario("numbers", corners.numbers),
    Scenario("writes", corners.writes, plans=("d4", "d2h2", "n2d2")),
    Scenario("beyond_the_end", corners.beyond_the_end, plans=("d4", "d2h2", "n2d2")),
    Scenario("same_bits", backward.same_bits, limit=0.0),
    Scenario("two_forwards", backward.two_forwards),
    Scenario("toggled", backward.toggled),
    Scenario("failed_backward", backward.failed_backward),
    Scenario("no_leak", backward.no_leak),
    Scenario("only_inputs", backward.only_inputs),
    Scenario("hooks_between_rules", history.hooks),
    Scenario("retained_between_rules", history.retained),
    Scenario("asked_for_between_rules", history.asked_for),
    Scenario("other_ways_between_rules", history.other_ways),
    Scenario("left_between_rules", history.left),
    Scenario("mixed_losses", backward.mixed_losses),
]
