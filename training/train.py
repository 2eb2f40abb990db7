"""The training loop: rows in, steps, a log, and the run's folder at the end and every few minutes.

python -m mnemosyne.training.train --minutes 8 --data build/training-data --out build/run
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import torch

from mnemosyne.engine.model import Titans
from mnemosyne.training import shards
from mnemosyne.training.curriculum import Curriculum
from mnemosyne.training.deepen import shut
from mnemosyne.training.feed import Feed
from mnemosyne.training.settings import Settings, parse
from mnemosyne.training.step import Step

OBSERVE_EVERY, LOG_EVERY = 25, 100


def learning_rate(settings: Settings, step: int, elapsed: float) -> float:
    """Linear warm-up by steps, then constant, then linear down to a hundredth at ``elapsed`` = 1."""
    falling = min(1.0, (1.0 - elapsed) / settings.decay)
    return settings.lr * min(1.0, (step + 1) / settings.warmup) * max(0.01, falling)


def build(settings: Settings, device: torch.device | None = None) -> Titans:
    """The model to be trained, on a GPU where there is one and no device is named."""
    torch.manual_seed(settings.seed)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Titans(settings.model).to(device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    if settings.bf16 or device.type == "cuda":
        model.set_compute(torch.bfloat16)
    return model


def facts(settings: Settings, step: int, curriculum: Curriculum, metrics: dict[str, float]) -> dict[str, Any]:
    """What ``run.json`` says about a run."""
    plain = {k: str(v) if not isinstance(v, int | float | str) else v for k, v in vars(settings).items()}
    return {
        "step": step,
        "noise": curriculum.noise,
        "settings": plain,
        "model": dataclasses.asdict(settings.model),
        "metrics": metrics,
    }


def train(settings: Settings) -> dict[str, float]:
    """Train for ``settings.minutes``; the last metrics."""
    model = build(settings)
    step = Step(model, settings)
    first, noise = 0, 0.0
    if settings.resume:
        earlier = shards.load(settings.resume, model, step.optimizer)
        first, noise = int(earlier["step"]), float(earlier["noise"])
    if settings.noise is not None:
        noise = settings.noise
    if settings.free == "last":
        shut(model)
    curriculum = Curriculum(settings.stages, settings.promote, noise, settings.noise_max)
    settings.out.mkdir(parents=True, exist_ok=True)
    print(json.dumps({"parameters": model.parameter_count(), "device": str(model.device)}), flush=True)
    start = saved = time.monotonic()
    limit, count, tokens = settings.minutes * 60, first, 0
    shown: dict[str, float] = {}
    with (
        Feed(settings, curriculum.noise, curriculum.length, first) as feed,
        (settings.out / "log.jsonl").open("a", encoding="utf-8") as log,
    ):
        while (elapsed := (time.monotonic() - start) / limit) < 1:
            batch, before = feed.get()
            if batch.tokens.shape[1] < curriculum.length:
                continue  # queued before the rows grew
            step(batch, learning_rate(settings, count - first, elapsed), before)
            count += 1
            tokens += batch.tokens.size
            if count % OBSERVE_EVERY == 0:
                metrics = step.read()
                length = curriculum.length
                # Rows within attention's reach have no far answers: it learns to answer first.
                curriculum.observe(metrics["far"] if "far" in metrics else metrics.get("near", 0.0))
                if curriculum.length < length:  # rows only grow: every new shape costs a capture
                    curriculum.noise = next(n for t, n in reversed(settings.stages) if t < length)
                feed.steer(curriculum.noise, curriculum.length)
                seconds = time.monotonic() - start
                shown = {"step": count, "seconds": seconds, "length": length, "noise": curriculum.noise}
                shown |= metrics
                shown["tokens_per_second"] = tokens / seconds
                log.write(json.dumps({k: round(v, 5) for k, v in shown.items()}) + "\n")
                log.flush()
                if count % LOG_EVERY == 0:
                    print(" ".join(f"{k}={v:.4g}" for k, v in shown.items()), flush=True)
            if time.monotonic() - saved > settings.save_every * 60:
                shards.save(settings.out, model, step.optimizer, facts(settings, count, curriculum, shown))
                saved = time.monotonic()
        shards.save(settings.out, model, step.optimizer, facts(settings, count, curriculum, shown))
    return shown


if __name__ == "__main__":
    train(parse())
