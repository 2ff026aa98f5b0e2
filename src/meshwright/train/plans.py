"""Which plan a configuration means: a file, the sizes of its axes, or all ranks along depth."""

from __future__ import annotations

from meshwright.config import Config
from meshwright.errors import PlanError
from meshwright.plan.plan import Plan


def resolve_plan(config: Config, started: int | None = None) -> Plan:
    """The plan of a job. `started` is how many ranks a launcher (torchrun, Slurm) has already started, if any.

    Raises `PlanError` if the plan needs another number of ranks than asked for or started.
    """
    wanted = config.plan
    sizes = {name: getattr(wanted, name) for name in ("data", "depth", "height", "width")}
    given = {name: size for name, size in sizes.items() if size is not None}
    if wanted.file is not None:
        if given:
            raise PlanError(f"plan.file = {wanted.file!r} and plan.{next(iter(given))} are both set; keep one of them")
        plan = Plan.load(wanted.file)
    elif given:
        plan = Plan.uniform(**given)
    else:
        plan = Plan.uniform(depth=started or config.ranks or 2)
    for count, what in ((config.ranks, "asked for (--ranks)"), (started, "started by the launcher")):
        if count is not None and count != plan.ranks:
            raise PlanError(
                f"the plan {plan} needs {plan.ranks} rank{'s' * (plan.ranks != 1)}, but {count} "
                f"{'were' if count != 1 else 'was'} {what}; change --ranks or the sizes under plan"
            )
    return plan
