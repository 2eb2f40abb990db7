"""Does momentum carry what follows a surprise?

Claim: Titans 3.1 (without past surprise a memory misses what comes after a surprising moment). First the
mechanism: what one surprising token does to a memory while tokens follow that write nothing. Then recall:
streams in which a cue is followed by tokens that matter as much as it does, and that a gate can't tell from
noise, since a gate sees one token. A control lets the gates see the four tokens before as well, as the
model's convolution would.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mnemosyne.kernels import chunk
from mnemosyne.kernels.gates import Gates, decays
from mnemosyne.kernels.network import unit
from mnemosyne.kernels.rules.registry import make_rule
from mnemosyne.training.experiments import measures, tasks
from mnemosyne.training.experiments.learner import PLAIN, Learner, Limits, Task, train
from mnemosyne.training.experiments.report import Line, Panel, Table

KINDS = ("what follows is unlike the cue", "what follows resembles the cue")
ARMS = (
    ("no momentum", 0.0, False),
    ("momentum", 0.9, False),
    ("no momentum, gates see four tokens back", 0.0, True),
    ("momentum, gates see four tokens back", 0.9, True),
)
"""Name, largest eta, whether the gates see back."""
FOLLOWERS = 4
ETAS, ALPHAS = (0.0, 0.3, 0.6, 0.9), (0.0, 0.03)
LAGS = (0, 1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class Setting:
    d: int
    tokens: int
    events: int
    chunk: int
    seeds: int
    batch: int
    steps: int
    judged: int


SETTINGS = {
    "tiny": Setting(d=8, tokens=32, events=2, chunk=8, seeds=2, batch=2, steps=3, judged=4),
    "small": Setting(d=16, tokens=128, events=4, chunk=8, seeds=4, batch=8, steps=300, judged=64),
    "full": Setting(d=32, tokens=512, events=8, chunk=8, seeds=8, batch=32, steps=1000, judged=128),
}


def response(eta: float, alpha: float, theta: float, tokens: int, device: torch.device) -> Tensor:
    """Share of a surprising value that is read back with its key after each of ``tokens`` tokens, of which
    only the first writes (the others' keys are zero)."""
    d, length = 8, 16
    rule = make_rule("titans", depth=1, architecture=PLAIN, clip=None, options={})
    k = torch.zeros(1, 1, tokens, d, device=device)
    v = torch.zeros_like(k)
    k[..., 0, 0] = v[..., 0, 1] = 1.0
    ask = torch.zeros_like(k)
    ask[..., 0] = 1.0
    gate = torch.ones(1, 1, 1, tokens, device=device)
    gates = Gates(theta * gate, eta * gate, alpha * gate).chunks(length)
    decay = decays(gates)
    nothing = [torch.zeros(1, 1, d, d, device=device)]
    k, v, ask = (x.unflatten(2, (-1, length)) for x in (k, v, ask))
    scanned = chunk.scan(k, v, None, decay, nothing, nothing, rule)
    return chunk.read(ask, decay, scanned, rule).flatten(2, 3)[0, 0, :, 1].cpu()


def draw(
    seed: int, setting: Setting, kinds: list[int], batch: int, device: torch.device
) -> tuple[Task, Tensor]:
    """A task that asks for cues and followers, and their places `[batch, events (1 + FOLLOWERS)]`."""
    g = tasks.generator(seed, device)
    H, T, d, span = len(kinds), setting.tokens, setting.d, 1 + FOLLOWERS
    slot = T // setting.events
    first = torch.randint(slot - span + 1, (batch, setting.events), generator=g, device=device)
    first = first + slot * torch.arange(setting.events, device=device)
    places = (first[..., None] + torch.arange(span, device=device)).flatten(1)
    keys, values = tasks.keys(g, batch, H, T, d), tasks.normal(g, batch, H, T, d) / d**0.5
    spread = places[:, None, :, None].expand(batch, H, -1, d)
    k, v = (x.gather(2, spread).unflatten(2, (-1, span)) for x in (keys, values))
    near = torch.tensor(kinds, device=device)[None, :, None, None, None] == 1
    later = torch.arange(span, device=device)[:, None] > 0
    k = torch.where(near & later, unit(0.7 * k[..., :1, :] + 0.7 * k), k).flatten(2, 3)
    v = torch.where(near & later, 0.9 * v[..., :1, :] + 0.44 * v, v).flatten(2, 3)
    features = torch.zeros(batch, T, span, device=device)
    lag = torch.arange(places.shape[1], device=device) % span
    features[torch.arange(batch, device=device)[:, None], places, lag[None]] = 1
    task = Task(
        keys.scatter(2, spread, k),
        values.scatter(2, spread, v),
        k,
        v,
        features[:, None].expand(-1, H, -1, -1),
    )
    return task, places


def run(setting: Setting, device: torch.device) -> tuple[list[Table], list[Panel]]:
    theta, lags = 0.05, list(range(64))
    rows, lines = [], []
    for alpha in ALPHAS:
        for eta in ETAS:
            read = response(eta, alpha, theta, len(lags), device)
            rows.append([f"{eta}", f"{alpha}", *(f"{read[lag]:.3f}" for lag in LAGS)])
            lines.append(Line(label=f"η {eta}, α {alpha}", x=lags[:33], y=read[:33].tolist()))
    columns = ["eta", "alpha", *(f"after {lag}" for lag in LAGS)]
    head = f"One surprising token (theta {theta}): share of its value read back, by tokens after it"
    tables = [Table(title=head, columns=columns, rows=rows)]
    panels = [Panel(title="response to one surprise", x="tokens after it", y="share read back", lines=lines)]
    near = recalled(setting, device)
    for kind, title in enumerate(KINDS):
        rows, lines = [], []
        for arm, (name, *_) in enumerate(ARMS):
            found = near[arm, kind]  # [seeds, lags and noise]
            rows.append([name, *(measures.percent(found[:, lag]) for lag in range(FOLLOWERS + 2))])
            mean, half = zip(
                *(measures.interval(100 * found[:, lag]) for lag in range(FOLLOWERS + 1)), strict=True
            )
            lines.append(Line(label=name, x=list(range(FOLLOWERS + 1)), y=mean, half=half))
        columns = ["memory", "cue", *(f"{lag + 1} after" for lag in range(FOLLOWERS)), "noise"]
        tables.append(Table(title=f"Right value nearest, %: {title}", columns=columns, rows=rows))
        panels.append(Panel(title=title, x="tokens after the cue", y="right value nearest, %", lines=lines))
    return tables, panels


def recalled(setting: Setting, device: torch.device) -> Tensor:
    """Share of nearest values that are right `[arms, kinds, seeds, lags and noise]`."""
    S, span = setting.seeds, 1 + FOLLOWERS
    members = [(arm, kind) for arm in ARMS for kind in (0, 1) for _ in range(S)]
    kinds = [kind for _, kind in members]
    seeing = torch.tensor([[1.0] + [float(arm[2])] * FOLLOWERS for arm, _ in members])
    rule = make_rule("titans", depth=1, architecture=PLAIN, clip=None, options={})
    limits = Limits(eta=[arm[1] for arm, _ in members])
    learner = Learner(
        rule, [setting.d] * 2, len(members), seed=2, limits=limits, features=span, seeing=seeing
    ).to(device)
    train(learner, lambda i: draw(i, setting, kinds, setting.batch, device)[0], setting.steps, setting.chunk)
    with torch.no_grad():
        task, places = draw(10**6, setting, kinds, setting.judged, device)
        kept = learner.store(task, setting.chunk).memory
        right = measures.nearest(
            learner.retrieve(kept, task.keys), task.values, torch.arange(setting.tokens, device=device)
        )
        at = places[:, None].expand(-1, len(members), -1)
        event = right.gather(2, at).unflatten(2, (-1, span)).mean((0, 2))
        noise = (right.sum((0, 2)) - right.gather(2, at).sum((0, 2))) / (
            setting.judged * (setting.tokens - places.shape[1])
        )
    return torch.cat([event, noise[:, None]], 1).view(len(ARMS), 2, S, -1).cpu()
