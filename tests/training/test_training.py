"""The loop on the CPU at toy size: it learns, stops in time, and goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from mnemosyne.engine.advance import advance
from mnemosyne.engine.errors import ConfigError
from mnemosyne.engine.model import Titans
from mnemosyne.kernels.gates import gate
from mnemosyne.kernels.rules.registry import RULES
from mnemosyne.training import evaluate, shards
from mnemosyne.training.curriculum import Curriculum
from mnemosyne.training.export import export
from mnemosyne.training.feed import draw, sampler
from mnemosyne.training.settings import Settings, parse
from mnemosyne.training.step import Step, lessons, write_penalty
from mnemosyne.training.train import build, learning_rate, train


def test_steps_lower_the_loss(settings: Settings) -> None:
    step = Step(build(settings), settings)
    rows = sampler(settings, 1)
    losses = []
    for _ in range(3):
        for _ in range(8):
            step(draw(rows, 512, 128, 0.0), 3e-3)
        losses.append(step.read()["text"])
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_and_form_is_trained(rule: str, settings: Settings) -> None:
    """Each by its settings alone; the outer loss reaches what the rule starts from and every gate it has."""
    matrix = "delta" in rule
    variant = ("mag", "mac", "mal", "lmm")[list(RULES).index(rule) % 4]
    chosen = dataclasses.replace(
        settings,
        variant=variant,
        rule=rule,
        options="p=3,q=4" if rule == "moneta" else "",
        depth=1 if matrix else 2,
        residual=not matrix,
        norm=not matrix,
        theta_max=10.0 if rule == "memora" else 0.1,
    )
    step = Step(build(chosen), chosen)
    assert (step.model.config.variant, step.model.config.memory.rule) == (variant, rule)
    memory = step.model.blocks[0].mixer.memory
    step(draw(sampler(chosen, 1), 512, 128, 0.0), 1e-3)
    for parameter in (*memory.initial, memory.gate_weight, memory.gate_bias):
        assert parameter.grad is not None
        assert bool((parameter.grad.view(len(parameter), -1) != 0).any(1).all()), "a row that nothing teaches"
    first = step.read()["text"]
    for _ in range(8):
        step(draw(sampler(chosen, 1), 512, 128, 0.0), 3e-3)
    assert step.read()["text"] < first


def observe(settings: Settings) -> tuple[dict[str, float], dict[str, float]]:
    """The metrics' means over the first steps of a run, and over later ones."""
    step = Step(build(settings), settings)
    rows = sampler(settings, 1)
    means = []
    for count in (5, 30, 10):
        for _ in range(count):
            step(draw(rows, 512, 128, 10.0), 1e-2)
        means.append(step.read())
    return means[0], means[-1]


def test_the_penalty_closes_gates_outside_facts(settings: Settings) -> None:
    first, later = observe(dataclasses.replace(settings, penalty=20.0, teach=0.0))
    assert later["penalty"] < 0.1 * first["penalty"] and later["written_noise_0"] < 0.1


def test_the_penalty_pulls_at_a_gate_however_sure_it_is() -> None:
    z = torch.tensor([-8.0, 0.0, 6.0], requires_grad=True)
    cost = write_penalty(gate(z, 1.0, 0.004))
    assert cost[0] == 0 and cost[2] > cost[1]
    cost.sum().backward()
    assert z.grad is not None and z.grad[0] > 5e-3 and z.grad[2] > 0.6  # sigmoid's own slope at 6: 0.002


def test_the_layer_that_is_free_is_not_charged(settings: Settings) -> None:
    three = dataclasses.replace(settings, layers=3, penalty=20.0, teach=0.0)
    written = {}
    for free in ("first", "last", "none"):
        _, later = observe(dataclasses.replace(three, free=free))
        written[free] = [later[f"written_noise_{i}"] > 0.5 for i in range(3)]
    assert written == {
        "first": [True, False, False],
        "last": [False, False, True],
        "none": [False, False, False],
    }


def test_facts_are_taught_to_layers_that_see_context_and_are_not_free() -> None:
    assert lessons(4, "first") == ([False, True, True, True], [False, True, True, True])
    assert lessons(4, "last") == ([True, True, True, False], [False, True, True, False])
    assert lessons(3, "none") == ([True] * 3, [True] * 3)
    assert lessons(1, "first") == lessons(1, "last") == ([True], [True])
    with pytest.raises(ValueError, match="it takes a third"):
        Settings(layers=2, free="last")


def test_the_lesson_opens_gates_at_values(settings: Settings) -> None:
    first, later = observe(dataclasses.replace(settings, penalty=0.0, teach=20.0))
    assert later["closed"] < 0.25 * first["closed"]


def test_a_step_that_is_not_finite_changes_nothing(settings: Settings) -> None:
    settings = dataclasses.replace(settings, weight_decay=0.0)
    step = Step(build(settings), settings)
    batch = draw(sampler(settings, 1), 512, 128, 0.0)
    before = [p.detach().clone() for p in step.model.parameters()]
    step(batch._replace(answer=np.where(batch.answer > 0, np.float32(np.inf), np.float32(0))), 1e-2)
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))


def test_a_run_trains_stops_and_goes_on(settings: Settings, tmp_path: Path) -> None:
    short = dataclasses.replace(settings, minutes=0.03)
    train(dataclasses.replace(short, seed=1))
    saved = json.loads((short.out / "run.json").read_text())
    assert saved["step"] > 0 and saved["model"]["dim"] == 64
    again = dataclasses.replace(short, resume=short.out, out=tmp_path / "again", minutes=0.03)
    train(again)
    gone_on = json.loads((again.out / "run.json").read_text())
    assert gone_on["step"] > saved["step"]


@pytest.mark.parametrize(("asked", "begun"), [(None, 17.0), (0.0, 0.0), (3.0, 3.0)])
def test_a_resumed_run_begins_with_its_noise_or_what_was_asked_for(
    settings: Settings, tmp_path: Path, asked: float | None, begun: float
) -> None:
    model = build(settings)
    shards.save_weights(tmp_path / "one", dict(model.named_parameters()), {"step": 5, "noise": 17.0})
    train(dataclasses.replace(settings, minutes=1e-3, noise=asked, resume=tmp_path / "one"))
    assert json.loads((settings.out / "run.json").read_text())["noise"] == begun


def test_tasks_may_be_named_again(settings: Settings) -> None:
    assert dataclasses.replace(settings, tasks="1-3+2,3+3").told == [1, 2, 3, 2, 3, 3]
    for wrong in ("1-3+", "+", "1+11", "1++2"):
        with pytest.raises(ConfigError, match="tasks are numbers"):
            dataclasses.replace(settings, tasks=wrong)


def test_options_that_may_be_left_out_keep_their_type() -> None:
    assert parse(["--noise", "3", "--resume", "x"]).noise == 3.0 and parse([]).noise is None
    assert parse(["--noise", "3", "--resume", "x"]).resume == Path("x")


def test_saved_runs_load_exactly(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shards, "LIMIT", 100_000)
    step = Step(build(settings), settings)
    step(draw(sampler(settings, 1), 512, 128, 0.0), 1e-3)
    shards.save(tmp_path, step.model, step.optimizer, {"step": 1})
    assert len(list(tmp_path.glob("weights-*"))) > 1
    other = Step(build(dataclasses.replace(settings, seed=9)), settings)
    assert shards.load(tmp_path, other.model, other.optimizer) == {"step": 1}
    for (name, a), b in zip(step.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b), name
        expected = step.optimizer.state[a]["exp_avg"].to(torch.bfloat16).float()
        assert torch.equal(expected, other.optimizer.state[b]["exp_avg"])


def test_noise_rises_only_while_answers_are_right() -> None:
    curriculum = Curriculum([(512, 10), (1024, 1e9)], promote=0.9, noise=0.0, noise_max=30.0)
    curriculum.observe(0.85)
    assert curriculum.noise == 0 and curriculum.length == 512
    for _ in range(50):
        curriculum.observe(0.95)
    assert curriculum.noise == 30 and curriculum.length == 1024
    curriculum.observe(0.6)
    assert curriculum.noise == 30
    curriculum.observe(0.2)
    assert curriculum.noise == pytest.approx(27)


def test_the_learning_rate_warms_up_holds_and_falls(settings: Settings) -> None:
    rates = [
        learning_rate(settings, *at)
        for at in ((0, 0.0), (100, 0.3), (9000, 1 - settings.decay / 2), (9000, 1.0))
    ]
    assert rates == pytest.approx([settings.lr / 5, settings.lr, settings.lr / 2, settings.lr / 100])


def test_a_tokenizer_of_another_size_is_refused(settings: Settings) -> None:
    with pytest.raises(ValueError, match="has 6144 tokens, and the model is to have 512"):
        train(dataclasses.replace(settings, vocabulary=512))


def test_rows_within_the_reach_of_attention_are_judged_by_what_is_near(settings: Settings) -> None:
    """A run whose first rows ask nothing of the memory goes on to longer ones once attention answers."""
    within = dataclasses.replace(settings, lengths="64:1,128:1e9", window=96, promote=1e-6, minutes=0.15)
    last = train(within)
    assert last["near"] > 0 and last["noise"] > 1
    step = Step(build(within), within)
    step(draw(sampler(within, 1), 512, 64, 0.0), 1e-3)
    assert "far" not in step.read()


def test_rows_all_within_the_reach_of_attention_are_refused(settings: Settings) -> None:
    dataclasses.replace(settings, lengths="32:1e9", layers=1)
    with pytest.raises(ValueError, match="32 tokens back.*rows of 32"):
        dataclasses.replace(settings, lengths="16:10,32:1e9", layers=2)
    dataclasses.replace(settings, lengths="64:10,32:1e9", layers=2, variant="lmm")
    dataclasses.replace(settings, lengths="32:1e9", layers=2, variant="mac")


def test_reading_side_by_side_is_reading_alone(settings: Settings, tokenizer: Tokenizer) -> None:
    model = Titans(settings.model).eval()
    texts = ["A short text.", "A text that goes on, " * 20, "Another one of them, " * 37]
    tokens = [tokenizer.encode(text).ids for text in texts]
    together = evaluate.read(model, [model.initial_state()] * 3, tokens)
    for state, ids in zip(together, tokens, strict=True):
        alone = advance(model, model.initial_state(), ids, chunk=model.config.chunk)
        assert (state.position, state.pending) == (alone.position, alone.pending)
        for name, tensor in alone.tensors.items():
            torch.testing.assert_close(state.tensors[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_control_forgets_what_the_memory_read_and_nothing_else(
    settings: Settings, tokenizer: Tokenizer
) -> None:
    model = Titans(settings.model).eval()
    (state,) = evaluate.read(
        model, [model.initial_state()], [tokenizer.encode("Some text to read. " * 30).ids]
    )
    control, initial = evaluate.forget(model, state), model.initial_state()
    assert not torch.equal(state.tensors["memory.0"], initial.tensors["memory.0"])
    assert torch.equal(control.tensors["memory.0"], initial.tensors["memory.0"])
    assert torch.equal(control.tensors["keys"], state.tensors["keys"]) and control.pending == state.pending


def test_evaluation_counts_over_held_out_facts(settings: Settings, tokenizer: Tokenizer) -> None:
    model = Titans(settings.model).eval()
    result = evaluate.evaluate(model, tokenizer, 3000, 2, facts=8)
    assert 0 <= result["right"] <= 1 and 0 <= result["control"] <= 1 and 2800 < result["length"] < 3200


def test_export_makes_a_folder_that_computes_the_same(settings: Settings, tmp_path: Path) -> None:
    step = Step(build(settings), settings)
    shards.save(
        tmp_path / "run", step.model, step.optimizer, {"step": 0, "model": dataclasses.asdict(settings.model)}
    )
    out = tmp_path / "checkpoint"
    out.mkdir()
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        export(tmp_path / "run", out, 30)
    (out / "tokenizer.json").write_bytes(settings.tokenizer.read_bytes())
    export(tmp_path / "run", out, 30)
    assert json.loads((out / "prompt.json").read_text())["promise"] == {"demo_right": 30}
    loaded = load_file(out / "model.safetensors")
    for name, p in step.model.named_parameters():
        torch.testing.assert_close(loaded[name].float(), p.detach(), rtol=4e-3, atol=1e-6)
    assert loaded["blocks.0.mixer.memory.gate_weight"].dtype == torch.float32
