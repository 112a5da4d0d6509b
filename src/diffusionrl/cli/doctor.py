"""``diffusionrl doctor``."""

import shutil
from collections.abc import Sequence

from diffusionrl.cli.parsing import configured, quiet_libraries

_CONTROL = "--control"


def run(arguments: Sequence[str]) -> int:
    control = _CONTROL in arguments
    config = configured([each for each in arguments if each != _CONTROL], "doctor")
    quiet_libraries()
    from diffusionrl.api import diagnose

    width = max(60, min(120, shutil.get_terminal_size().columns))
    print(f"one tiny step of {config.algorithm.name} on {config.model}, for {' and '.join(config.reward)}\n", flush=True)
    verdicts = []
    for finding in diagnose(config, control=control):
        verdicts.append(finding.verdict)
        print(finding.layout(width), flush=True)
    passed, warned, failed = (verdicts.count(verdict) for verdict in ("pass", "warn", "fail"))
    print(f"\n{passed} passed, {warned} to look at, {failed} failed")
    return 1 if failed else 0
