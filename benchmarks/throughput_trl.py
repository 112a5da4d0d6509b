"""Worker of throughput.py: one step of TRL 0.23.1's DDPOTrainer, timed; prints one line of JSON. Runs in TRL's environment."""

import argparse
import json
import random
import resource
import time

import torch
from accelerate import PartialState
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True, help="text file, one a line")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--num-steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--sample-batch", type=int, default=6)
    parser.add_argument("--train-batch", type=int, default=3)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--mixed-precision", default="no")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with open(options.prompts) as file:
        prompts = file.read().splitlines()
    cuda = torch.cuda.is_available()
    config = DDPOConfig(
        sample_num_steps=options.num_steps,
        sample_guidance_scale=options.guidance,
        sample_batch_size=options.sample_batch,
        sample_num_batches_per_epoch=options.samples // options.sample_batch,
        train_batch_size=options.train_batch,
        train_gradient_accumulation_steps=max(1, options.samples // options.updates // options.train_batch),
        train_learning_rate=3e-4,
        mixed_precision=options.mixed_precision,
        allow_tf32=False,
        log_with=None,
        num_epochs=1,
        save_freq=10**9,  # no checkpoint inside a timed step
        seed=0,
    )
    PartialState()  # TRL's pipeline logs before its trainer has made one
    pipeline = DefaultDDPOStableDiffusionPipeline(options.model, pretrained_model_revision=None, use_lora=True)
    trainer = DDPOTrainer(
        config,
        lambda images, prompts, metadata: (images.float().mean((1, 2, 3)), {}),
        lambda: (random.choice(prompts), {}),
        pipeline,
    )
    sampling_seconds = 0.0
    generate = trainer._generate_samples

    def timed_generate(*arguments, **keywords):
        nonlocal sampling_seconds
        began = time.perf_counter()
        result = generate(*arguments, **keywords)
        if cuda:
            torch.cuda.synchronize()
        sampling_seconds = time.perf_counter() - began
        return result

    trainer._generate_samples = timed_generate

    def step(number: int) -> tuple[float, float]:
        began = time.perf_counter()
        trainer.step(number, number)
        if cuda:
            torch.cuda.synchronize()
        return sampling_seconds, time.perf_counter() - began - sampling_seconds

    step(0)
    times = [step(number) for number in range(1, options.repeats + 1)]
    memory = (
        torch.cuda.max_memory_allocated() / 1e9 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    )
    result = {
        "sampling_seconds": min(sampling for sampling, _ in times),
        "update_seconds": min(update for _, update in times),
        "step_seconds": min(sampling + update for sampling, update in times),
        "peak_memory_gb": memory,
    }
    print(json.dumps(vars(options) | result))


if __name__ == "__main__":
    main()
