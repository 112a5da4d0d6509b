"""What a run began from that its settings only name: weights, and code. It is the same when the run goes on."""

import math
import sys
from collections.abc import Sequence
from typing import Any

from diffusionrl import processes
from diffusionrl.errors import UserError
from diffusionrl.foreign.finding import code_of, find_function
from diffusionrl.foreign.names import is_code
from diffusionrl.policies.base import Policy
from diffusionrl.rewards import Mixture

_ALIKE = 0.05  # relative, of a score: another machine or batch rounds otherwise


class Beginnings:
    """Of one run, as this process finds it.

    Args:
        rewards: all that there are, those that are only measured too.

    Attributes:
        found: what a checkpoint holds of it, JSON values.
    """

    def __init__(self, policy: Policy, rewards: Sequence[Mixture]) -> None:
        self.found: dict[str, Any] = {
            "policy": {"the base model": policy.about.get("weights"), "the file of policy.lora": policy.about.get("lora")},
            "code": {f"the reward {name}": code for each in rewards for name, code in each.code().items()}
            | ({"the model": code_of(find_function("model", policy.source, ""))} if is_code(policy.source) else {}),
            "scores": {name: score for each in rewards for name, score in each.tried.items()},
        }

    def check(self, then: dict[str, Any], allow_changes: bool) -> None:
        """Compare with what a checkpoint says; what only may matter is said.

        Raises:
            UserError: something is another one now.
        """
        now = self.found
        changed = [what for what, value in now["policy"].items() if then["policy"].get(what) != value]
        for what, code in now["code"].items():
            before = then["code"].get(what, code)
            if before["function"] != code["function"]:
                changed.append(f"the code of {what}")
            elif before["file"] != code["file"] and processes.is_main():
                print(f"warning: the file of {what} has changed since the run began", file=sys.stderr)
        if changed and not allow_changes:
            raise UserError(
                f"{' and '.join(changed)}: not what the run began with. Choose another --name, or go on all the same with "
                "--checkpoint.allow-changes"
            )
        for name, score in now["scores"].items():
            before = then["scores"].get(name, score)
            if processes.is_main() and not math.isclose(before, score, rel_tol=_ALIKE, abs_tol=1e-6):
                print(
                    f"warning: the reward {name} gives a grey image {score:.4g}, and {before:.4g} when the run began: is it "
                    "another model, or another server?",
                    file=sys.stderr,
                )
