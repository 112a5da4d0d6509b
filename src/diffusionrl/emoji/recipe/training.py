"""The training loop that the stages share: Muon and AdamW, warm-up and cosine decay, save and resume."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

AVERAGE_POWER = 16


@dataclass(frozen=True)
class TrainingConfig:
    """What the stages have in common."""

    out: Path
    """Folder of this stage's state, log and weights."""
    num_steps: int = 1000
    """Optimizer steps. May be changed between a stop and a resume: the schedule follows step / num_steps."""
    batch_size: int = 16
    learning_rate: float = 1e-2
    """Peak rate of Muon (matrices and kernels), scaled to match AdamW's root mean square."""
    vector_learning_rate: float = 2e-3
    """Peak rate of AdamW (biases, norms, embeddings)."""
    warmup_steps: int = 50
    save_every: int = 500
    log_every: int = 100
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


class MatrixOptimizer:
    """Muon for every weight that is a matrix or a convolution kernel, AdamW for the rest.

    Muon (Jordan et al. 2024) orthogonalises the momentum; a kernel counts as the matrix (out, in * height * width). On these
    small networks and few images it learns far more a sample than AdamW. ``torch.optim.Muon`` takes no kernels and iterates in
    bfloat16, which is slow on most CPUs, hence these few lines.
    """

    def __init__(self, module: torch.nn.Module, config: TrainingConfig) -> None:
        embeddings = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
        trained = [p for p in module.parameters() if p.requires_grad]
        self.matrices = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
        self.vectors = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        self.adamw = torch.optim.AdamW([{"params": self.vectors}], betas=(0.9, 0.99), weight_decay=0.0)
        self.config = config

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step at ``factor`` times the peak rates; gradients are clipped to norm 1 and cleared."""
        torch.nn.utils.clip_grad_norm_(self.matrices + self.vectors, 1.0, error_if_nonfinite=True)
        for parameter, momentum in zip(self.matrices, self.momenta, strict=True):
            if parameter.grad is None:
                continue
            momentum.lerp_(parameter.grad, 0.05)
            nesterov = parameter.grad.lerp(momentum, 0.95)
            direction = orthogonalise(nesterov.flatten(1)).view_as(parameter)
            scale = 0.2 * max(direction.shape[0], direction[0].numel()) ** 0.5  # the root mean square of AdamW's steps
            parameter.add_(direction, alpha=-scale * factor * self.config.learning_rate)
        self.adamw.param_groups[0]["lr"] = factor * self.config.vector_learning_rate
        self.adamw.step()
        for parameter in self.matrices + self.vectors:
            parameter.grad = None

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {f"momentum.{index}": momentum for index, momentum in enumerate(self.momenta)}
        for index, entry in self.adamw.state_dict()["state"].items():
            found |= {f"adamw.{index}.{key}": value for key, value in entry.items()}
        return found

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            owner, index, *key = name.split(".")
            if owner == "momentum":
                self.momenta[int(index)].copy_(value)
            else:
                state.setdefault(int(index), {})[key[0]] = value
        self.adamw.load_state_dict(self.adamw.state_dict() | {"state": state})


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """About U V^T of the singular value decomposition U S V^T, by five Newton-Schulz iterations."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


@torch.no_grad()
def update_average(average: torch.nn.Module, module: torch.nn.Module, step: int) -> None:
    """The power-function average of Karras et al. (arXiv 2312.02696): it looks back over about the last tenth of the steps."""
    decay = (1 - 1 / (step + 1)) ** (AVERAGE_POWER + 1)
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)


def train_stage(
    module: torch.nn.Module,
    loss: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    config: TrainingConfig,
    average: torch.nn.Module | None = None,
) -> None:
    """Train ``module`` in place, from its newest saved state if there is one.

    Args:
        loss: step -> (loss, metrics to log). Its randomness must come from ``seeds``, keyed by the step, so that a resumed
            run goes on as if it had not stopped.
        average: a copy of ``module`` that becomes the moving average of its weights.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    optimizer = MatrixOptimizer(module, config)
    state_file, log_file = config.out / "state.safetensors", config.out / "log.jsonl"
    first = 0
    if state_file.exists():
        tensors = load_file(state_file, device=config.device)
        first = int(tensors.pop("step"))
        module.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        optimizer.load_tensors({k[10:]: v for k, v in tensors.items() if k.startswith("optimizer.")})
        if average:
            average.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("average.")})
        print(f"resumed at step {first}", flush=True)
    module.train()
    totals: dict[str, float] = {}
    began, logged = time.perf_counter(), first
    for step in range(first, config.num_steps):
        value, metrics = loss(step)
        value.backward()  # type: ignore[no-untyped-call]
        warmup = min(1.0, (step + 1) / config.warmup_steps)
        optimizer.step(warmup * 0.5 * (1 + math.cos(math.pi * step / config.num_steps)))
        if average:
            update_average(average, module, step)
        for key, number in metrics.items():
            totals[key] = totals.get(key, 0.0) + number
        if (step + 1) % config.log_every == 0:
            count = step + 1 - logged
            rate = count * config.batch_size / (time.perf_counter() - began)
            line = {"step": step + 1, "samples_per_second": round(rate, 1)}
            line |= {key: round(total / count, 5) for key, total in totals.items()}
            with log_file.open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(line, flush=True)
            totals, began, logged = {}, time.perf_counter(), step + 1
        if (step + 1) % config.save_every == 0 or step + 1 == config.num_steps:
            tensors = {"step": torch.tensor(step + 1)}
            tensors |= {f"model.{k}": v.contiguous() for k, v in module.state_dict().items()}
            tensors |= {f"optimizer.{k}": v.contiguous() for k, v in optimizer.tensors().items()}
            if average:
                tensors |= {f"average.{k}": v.contiguous() for k, v in average.state_dict().items()}
            save_file(tensors, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
    module.eval()
