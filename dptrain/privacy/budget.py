"""Where a budget stops a run: one answer for every loop."""

from dptrain.privacy import accounting
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import plan as plan_lib


def last_affordable(
  plan: plan_lib.PrivacyPlan,
  ledger: ledger_lib.Ledger,
  branch: str,
  step: int,
) -> int:
  """Updates that a branch may have in all before the budget is spent.

  What the ledger already has is paid for, on whatever branch, as is what was
  released beside the updates: repeating it is free, and what comes after it is
  priced on top.

  Args:
    plan: of the run.
    ledger: of MODEL_DIR.
    branch: name of the branch that goes on.
    step: updates that its state contains.

  Returns:
    At most `plan.num_steps`, and that without a budget.
  """
  if plan.target_epsilon is None:
    return plan.num_steps
  start = ledger.first_step(branch)
  written = max(step, ledger.last_step(branch) + 1)
  others = ledger.releases(without=branch)
  return written + accounting.affordable_steps(
    # Updates may share a round with what this branch has released already.
    lambda n: [*others, *plan.releases(start, written + n)],
    plan.num_steps - written,
    plan.target_epsilon,
    ledger.delta_left(plan.delta),
    plan.relation,
  )
