"""``diffusionrl train``."""

from collections.abc import Sequence

from diffusionrl.cli.parsing import configured, quiet_libraries


def run(arguments: Sequence[str]) -> int:
    config = configured(arguments, "train")
    quiet_libraries()
    from diffusionrl import processes
    from diffusionrl.api import train
    from diffusionrl.report.picture import draw_before_after

    result = train(config)
    if not processes.is_main():
        return 0
    picture = draw_before_after(result.run_dir)
    before, after = result.before, result.after
    print(f"\nreward on the same {config.evaluation.num_samples} fixed seeds and prompts, mean ± standard error")
    print(f"  before  {before.mean:9.3f} ± {before.standard_error:.3f}")
    print(f"  after   {after.mean:9.3f} ± {after.standard_error:.3f}")
    print(f"report:               {result.run_dir / 'report.html'}")
    print(f"before/after picture: {picture}")
    print(f"trained weights:      {result.run_dir / 'export'}")
    return 1 if result.not_pushed else 0
