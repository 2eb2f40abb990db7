"""The experiments at a size that takes no time: parts against direct computations, and each as a whole."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mnemosyne.kernels.gates import Gates
from mnemosyne.kernels.reference import memory_network, reference
from mnemosyne.kernels.rules.moneta import PowerNorm
from mnemosyne.kernels.rules.registry import make_rule
from mnemosyne.training.experiments import (
    chaos,
    depth,
    figures,
    forgetting,
    measures,
    memora,
    momentum,
    moneta,
    outliers,
    report,
    tasks,
)
from mnemosyne.training.experiments.__main__ import EXPERIMENTS, run
from mnemosyne.training.experiments.learner import (
    PAPER,
    PLAIN,
    Learner,
    Limits,
    Task,
    clip,
    relative_error,
    train,
)
from mnemosyne.training.experiments.report import Line, Panel, Result, Table

CPU = torch.device("cpu")
NAMES = ("depth", "momentum", "forgetting", "outliers", "memora", "moneta", "chaos")


def pairs(seed: int, batch: int, members: int, count: int, d: int) -> Task:
    g = tasks.generator(seed, CPU)
    k, v = tasks.keys(g, batch, members, count, d), tasks.normal(g, batch, members, count, d)
    return Task(k, v, k, v)


def cells(table: Table) -> list[float]:
    """The numbers at the beginning of cells."""
    found = []
    for row in table.rows:
        for cell in row[1:]:
            try:
                found.append(float(cell.split(" ")[0]))
            except ValueError:
                assert cell and cell[0] not in "0123456789.", cell
    return found


def test_there_are_the_seven_experiments_and_one_that_trains_models() -> None:
    assert tuple(EXPERIMENTS) == (*NAMES, "recipe")


def test_what_a_learner_answers_is_what_the_reference_says() -> None:
    rule = make_rule("titans", depth=2, architecture=PAPER, clip=None, options={})
    learner = Learner(rule, [6, 10, 6], 3, seed=0, features=2, limits=Limits(eta=[0.9, 0.0, 0.9])).double()
    task = pairs(1, 2, 3, 8, 6)
    seen = tasks.normal(tasks.generator(2, CPU), 2, 3, 8, 2)
    task = Task(*(x.double() for x in (*task[:4], seen)))
    with torch.no_grad():
        answered, gates = learner(task, 4), learner.gates(task)
    assert gates.eta is not None and gates.alpha is not None
    for b, h in ((0, 0), (1, 1), (1, 2)):
        mine = Gates(gates.theta[b, h], gates.eta[b, h], gates.alpha[b, h])
        start = [m[h].detach() for m in learner.initial]
        zero = [torch.zeros_like(m) for m in start]
        k, v = task.keys[b, h], task.values[b, h]
        _, memory, _, _ = reference(k, k, v, mine, start, zero, rule, chunk=4)
        direct = memory_network(memory, task.queries[b, h], PAPER)
        torch.testing.assert_close(answered[b, h], direct, rtol=1e-9, atol=1e-9)
    assert float(gates.eta[:, 1].max()) == 0.0 and float(gates.eta[:, 0].min()) > 0.0
    assert gates.theta.std(-1).min() > 0  # the features are seen


def test_one_gate_for_all_layers_is_that_of_the_first() -> None:
    rule = make_rule("titans", depth=3, architecture=PLAIN, clip=None, options={})
    learner = Learner(rule, [4, 5, 5, 4], 2, seed=0, shared=[False, True])
    with torch.no_grad():
        learner.bias += torch.arange(3.0)
    theta = learner.gates(pairs(0, 1, 2, 4, 4)).theta[0, :, :, 0]
    assert len(set(theta[0].tolist())) == 3
    assert theta[1].tolist() == theta[0, :1].tolist() * 3


def test_training_lowers_the_error_and_members_do_not_meet() -> None:
    rule = make_rule("titans", depth=1, architecture=PLAIN, clip=None, options={})

    def trained(spoil: float) -> tuple[list[float], Tensor]:
        learner = Learner(rule, [8, 8], 2, seed=0)

        def draw(step: int) -> Task:
            task = pairs(step, 4, 2, 8, 8)
            task.values[:, 1] *= spoil
            return task

        losses = train(learner, draw, 40, 4)
        return losses, learner.initial[0][0].detach()

    losses, mine = trained(1.0)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    _, beside_an_infinite_one = trained(1e30)
    assert torch.equal(mine, beside_an_infinite_one)


def test_each_member_has_its_own_gradient_norm() -> None:
    rule = make_rule("titans", depth=2, architecture=PLAIN, clip=None, options={})
    learner = Learner(rule, [2, 3, 2], 3, seed=0)
    for parameter in learner.parameters():
        parameter.grad = torch.zeros_like(parameter)
    matrix, bias = learner.initial[0].grad, learner.bias.grad
    assert matrix is not None and bias is not None
    matrix[0, 0, 0], bias[0, 0, 1] = 3.0, 4.0
    matrix[1, 0, 0] = 0.5
    matrix[2] = math.nan
    clip(learner)
    assert float(matrix[0, 0, 0]) == pytest.approx(0.6) and float(bias[0, 0, 1]) == pytest.approx(0.8)
    assert float(matrix[1, 0, 0]) == 0.5
    assert float(matrix[2].abs().max()) == 0.0


def test_recall_is_what_a_loop_counts() -> None:
    g = tasks.generator(3, CPU)
    stored, answered = tasks.normal(g, 2, 1, 6, 4), tasks.normal(g, 2, 1, 6, 4)
    found = measures.nearest(answered, stored, torch.arange(6))
    for b in range(2):
        for i in range(6):
            distances = [float((answered[b, 0, i] - stored[b, 0, j]).norm()) for j in range(6)]
            assert float(found[b, 0, i]) == float(distances.index(min(distances)) == i)
    assert measures.interval(torch.tensor([1.0, 2.0, 3.0]))[0] == 2.0
    assert measures.interval(torch.tensor([1.0, 2.0, 3.0]))[1] == pytest.approx(4.30 / math.sqrt(3))


@pytest.mark.parametrize("d", [16, 32])
def test_equal_parameters_are_nearly_equal(d: int) -> None:
    for family, budget in zip(depth.memories(d).values(), (d * d, 8 * d * d), strict=True):
        assert [len(widths) for _, widths, _ in family] == [2, 3, 4, 5]
        assert all(abs(count / budget - 1) < 0.08 for _, _, count in family), family


def test_a_wide_linear_memory_leaves_its_padding_alone() -> None:
    task = depth.widened(pairs(0, 2, 1, 8, 4), 12, CPU)
    rule = make_rule("titans", depth=1, architecture=PLAIN, clip=None, options={})
    learner = Learner(rule, [12, 12], 1, seed=0)
    with torch.no_grad():
        learner.initial[0][:, 4:] = 0
    losses = train(learner, lambda _: task, 5, 4)
    with torch.no_grad():
        kept = learner.store(task, 4).memory[0]
        answered = learner(task, 4)
    assert float(kept[:, :, 4:].abs().max()) == 0.0
    assert float(answered[..., 4:].abs().max()) == 0.0
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("eta", "alpha"), [(0.0, 0.0), (0.6, 0.0), (0.9, 0.03)])
def test_the_response_to_one_surprise_is_the_sum_of_the_series(eta: float, alpha: float) -> None:
    read = momentum.response(eta, alpha, 0.05, 32, CPU)
    for t in range(32):
        direct = 2 * 0.05 * sum((1 - alpha) ** (t - i) * eta**i for i in range(t + 1))
        assert float(read[t]) == pytest.approx(direct, rel=1e-4)


def test_followers_stand_behind_their_cue() -> None:
    setting = momentum.SETTINGS["tiny"]
    task, places = momentum.draw(0, setting, [0, 1], 3, CPU)
    span = 1 + momentum.FOLLOWERS
    assert task.features is not None
    for b in range(3):
        for event in places[b].view(-1, span):
            assert event.tolist() == list(range(int(event[0]), int(event[0]) + span))
            assert torch.equal(task.features[b, 0, event], torch.eye(span))
    assert float(task.features.sum()) == places.numel() * 2
    likeness = (task.queries[:, :, 1:span] * task.queries[:, :, :1]).sum(-1).mean((0, 2))
    assert likeness[1] > 0.6 > abs(likeness[0])


def test_outliers_are_as_many_as_said_and_none_is_asked_for() -> None:
    setting = outliers.SETTINGS["tiny"]
    task, asked = outliers.draw(0, setting, [(0.0, 1.0), (0.25, 100.0)], 5, CPU)
    far = task.values.norm(dim=-1) > 50
    assert far.sum(-1).tolist() == [[0, 2]] * 5
    assert not far.gather(2, asked).any()
    stored = task.values.gather(2, asked[..., None].expand_as(task.answers))
    assert torch.equal(stored, task.answers)


def test_the_papers_form_of_memora_is_one_exact_step_and_then_linear_ones() -> None:
    rule = make_rule("memora", depth=2, architecture=PAPER, clip=None, options={})
    learner = Learner(rule, [5, 7, 5], 1, seed=0, features=2).double()
    seen_of_tokens = 5 * tasks.normal(tasks.generator(5, CPU), 1, 1, 6, 2)
    task = Task(*(x.double() for x in (*pairs(4, 1, 1, 6, 5)[:4], seen_of_tokens)))
    with torch.no_grad():
        seen = memora.paper_store(learner, task, 3)
        gates = learner.gates(task)
    assert gates.alpha is not None
    W = [torch.softmax(m[0].detach(), -1) for m in learner.initial]
    at = W
    for t in range(6):
        if t % 3 < 2:  # before the first token of a chunk, and after it
            at = [w.clone().requires_grad_(True) for w in W]
        error = memory_network(at, task.keys[0, 0, t : t + 1], PAPER) - task.values[0, 0, t]
        gradients = torch.autograd.grad(error.square().sum(), at)
        for i, gradient in enumerate(gradients):
            theta, keep = gates.theta[0, 0, i, t], 1 - gates.alpha[0, 0, i, t]
            if t % 3 == 0:
                W[i] = torch.softmax(keep * W[i].clamp(min=memora.SMALLEST).log() - theta * gradient, -1)
            else:
                W[i] = keep * W[i] - theta * gradient
        if t % 3 == 2:
            for mine, direct in zip(seen[t // 3], W, strict=True):
                torch.testing.assert_close(mine[0, 0], direct.detach(), rtol=1e-9, atol=1e-9)
    assert (seen[-1][0].sum(-1) - 1).abs().max() > 1e-3
    kept = learner.store(task, 3).memory
    assert all((torch.softmax(z, -1).sum(-1) - 1).abs().max() < 1e-12 for z in kept)


def test_a_bare_norm_lets_moneta_grow_as_it_forgets() -> None:
    a = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0)) * 1e-3
    assert moneta.Bare(q=4.0).weights(a).norm() > 100 * a.norm()
    assert PowerNorm(q=4.0).weights(a).norm() <= a.norm()


def test_a_difference_stays_where_nothing_is_learned_and_grows_in_chaos() -> None:
    setting = chaos.SETTINGS["tiny"]
    grid = [(0.0, -6.0), (4e-2, -3.0)]
    grew, numbers = chaos.followed(chaos.Structure("", depth=2), grid, setting, CPU)
    assert grew.shape == (1, 2, 2) and numbers.shape == (1, 2, 2, len(chaos.NUMBERS))
    assert grew[0, 0].abs().max() < 1e-3
    assert grew[0, 1].min() > 0.5
    assert numbers[0, 0, :, 3].max() == 0 and numbers[0, 1, :, 3].min() > 2
    # The weighted mean is the Frobenius norm's square over the trace, and no more than the largest.
    trace, frobenius, mean, largest = numbers[0, 1, 0, :4]
    assert frobenius <= trace and mean <= largest <= frobenius * (1 + 1e-9)


def test_the_area_is_the_share_of_pairs_in_order() -> None:
    number = torch.tensor([0.1, 0.9, 0.4, 0.3])
    grows = torch.tensor([False, True, False, True])
    assert chaos.area(number, grows) == 0.75
    assert chaos.area(number, number > 0.35) == 1.0


def test_blocks_of_a_long_stream_are_judged_by_age() -> None:
    setting = forgetting.SETTINGS["tiny"]
    near, error, early, alpha, _ = forgetting.measured([8, 8], PLAIN, setting, CPU)
    shape = (len(forgetting.ARMS), setting.seeds)
    assert near.shape == error.shape == (*shape, setting.judged)
    assert early.shape == shape
    assert [bool((alpha[i] > 0).all()) for i in range(len(forgetting.ARMS))] == [
        False,
        True,
        False,
        True,
        True,
    ]
    assert near[..., -8:].mean() > near[..., :32].mean()


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_runs_and_is_written_down(name: str, tmp_path: Path) -> None:
    result = run(name, "tiny", CPU)
    for table in result.tables:
        assert table.rows and all(len(row) == len(table.columns) for row in table.rows), table.title
        assert not any("|" in cell for row in [table.columns, *table.rows] for cell in row)
    numbers = [number for table in result.tables for number in cells(table)]
    assert len(numbers) > 10 and all(math.isfinite(number) for number in numbers)
    for panel in result.panels:
        assert all(len(line.x) == len(line.y) for line in panel.lines)
    report.save(result, tmp_path)
    again = report.load(tmp_path / f"{name}.json")
    assert report.markdown(again) == report.markdown(result)
    assert figures.draw(again, tmp_path).read_text().startswith("<?xml")


def test_a_figure_has_the_same_bytes_twice(tmp_path: Path) -> None:
    line = Line(label="a line", x=[1.0, 2.0], y=[3.0, 5.0], half=[0.1, 0.2])
    panel = Panel(title="t", x="x", y="y", lines=[line, line], logarithmic="x")
    result = Result(name="one", size="tiny", setting={}, machine="", tables=[], panels=[panel])
    first = figures.draw(result, tmp_path).read_bytes()
    assert first == figures.draw(result, tmp_path).read_bytes()
    assert b"<dc:date>" not in first


def test_a_page_keeps_what_stands_around_its_tables(tmp_path: Path) -> None:
    page = tmp_path / "depth.md"
    page.write_text(f"# Depth\n\nWhy.\n\n{report.BEGIN}\nold\n{report.END}\n\nWhat came out.\n")
    report.fill(page, "new")
    report.fill(page, "newer")
    text = page.read_text()
    assert text == f"# Depth\n\nWhy.\n\n{report.BEGIN}\nnewer\n{report.END}\n\nWhat came out.\n"
    report.fill(tmp_path / "fresh.md", "new")
    assert "new" in (tmp_path / "fresh.md").read_text()


def test_a_silent_memory_has_a_relative_error_of_one() -> None:
    answers = pairs(0, 1, 1, 4, 8).answers
    assert torch.equal(relative_error(torch.zeros_like(answers), answers), torch.ones(1, 1, 4))
