"""One arm of Figure 1: its batches, its evaluations, and its training through the loop."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from batchnorm.experiments.data.mnist import Mnist
from batchnorm.experiments.mnist import GRID, MnistTask, Options, evaluation_steps, grid_steps
from batchnorm.experiments.training import StoppedError, read_rows, train

OPTIONS = Options(steps=130, seeds=(0, 1), hidden=(6, 5), learning_rate=0.5)


def make_task(data: Mnist, arm: str = "bn", **changes: object) -> MnistTask:
    options = dataclasses.replace(OPTIONS, **changes)
    return MnistTask(arm, arm, list(options.seeds), options, data)


def trained(data: Mnist, folder: Path, arm: str = "bn", **changes: object) -> MnistTask:
    folder.mkdir(parents=True, exist_ok=True)
    task = make_task(data, arm, **changes)
    train(task, folder)
    return task


def state(task: MnistTask) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in task.model.state_dict().items()}


def assert_same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, value in first.items():
        assert value.equal(second[name]), name


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_covers_every_example_at_most_once_and_all_that_fill_batches(small_mnist: Mnist, epoch: int):
    task = make_task(small_mnist)
    order = task.epoch_order(epoch)
    assert order.shape == (20, 2 * 60)
    for own in order.view(20, 2, 60).unbind(1):
        assert len(own.unique()) == 1200
        assert 0 <= own.min() <= own.max() < 1220


def test_an_epoch_of_the_real_data_covers_every_example_exactly_once(mnist: Mnist):
    order = make_task(mnist, seeds=(3,)).epoch_order(2)
    assert order.shape == (1000, 60)
    assert order.flatten().sort().values.equal(torch.arange(60_000))


def test_images_and_labels_of_a_batch_belong_together(small_mnist: Mnist):
    task = make_task(small_mnist)
    images, labels = task.batch(25)
    index = task.epoch_order(1)[5]
    assert images.shape == (2, 60, 784)
    assert images.view(120, 784).equal(small_mnist.train_images[index].float())
    assert labels.equal(small_mnist.train_labels[index])


def test_both_arms_see_the_same_batches(small_mnist: Mnist):
    plain, bn = make_task(small_mnist, "plain"), make_task(small_mnist, "bn")
    for step in (0, 19, 20, 55):
        for a, b in zip(plain.batch(step), bn.batch(step), strict=True):
            assert a.equal(b)


def test_batches_depend_on_seed_and_step_alone(small_mnist: Mnist):
    in_order, jumping = make_task(small_mnist, seeds=(0, 1)), make_task(small_mnist, seeds=(5, 1))
    in_order_batches = {step: in_order.batch(step) for step in range(45)}
    for step in (44, 3, 20, 19, 0, 44):
        images, labels = jumping.batch(step)
        assert images[1].equal(in_order_batches[step][0][1])
        assert labels[60:].equal(in_order_batches[step][1][60:])
        assert not images[0].equal(in_order_batches[step][0][0])


def test_epochs_are_shuffled_differently(small_mnist: Mnist):
    task = make_task(small_mnist)
    assert not task.epoch_order(0).equal(task.epoch_order(1))


def test_the_loss_is_the_sum_of_each_networks_mean_cross_entropy(small_mnist: Mnist):
    task = make_task(small_mnist)
    images, labels = task.batch(0)
    own = [torch.nn.functional.cross_entropy(task.model(images)[i], labels.view(2, 60)[i]) for i in range(2)]
    torch.testing.assert_close(task.loss(images, labels), torch.stack(own).sum())


@pytest.mark.parametrize("arm", ["plain", "bn"])
def test_a_network_trains_the_same_in_any_stack(small_mnist: Mnist, tmp_path: Path, arm: str):
    both = trained(small_mnist, tmp_path / "both", arm, steps=30)
    alone = trained(small_mnist, tmp_path / "alone", arm, steps=30, seeds=(1,))
    for name, value in both.model.network_state(1).items():
        torch.testing.assert_close(value, alone.model.network_state(0)[name], msg=name)


@pytest.mark.parametrize("arm", ["plain", "bn"])
def test_a_stopped_run_resumes_bit_for_bit(small_mnist: Mnist, tmp_path: Path, arm: str):
    whole = trained(small_mnist, tmp_path / "whole", arm)
    for _ in range(2):
        with pytest.raises(StoppedError):
            train(make_task(small_mnist, arm), tmp_path, should_stop=lambda: True)
    resumed = trained(small_mnist, tmp_path, arm)
    assert_same_state(state(whole), state(resumed))
    assert (tmp_path / f"{arm}.jsonl").read_bytes() == (tmp_path / "whole" / f"{arm}.jsonl").read_bytes()


def test_evaluation_does_not_change_training(small_mnist: Mnist, tmp_path: Path):
    usual = trained(small_mnist, tmp_path / "usual")
    (tmp_path / "often").mkdir()
    often = make_task(small_mnist)
    often.evaluation_steps = set(range(0, 131, 2))
    train(often, tmp_path / "often")
    (tmp_path / "never").mkdir()
    never = make_task(small_mnist)
    never.evaluation_steps = set()
    train(never, tmp_path / "never")
    assert_same_state(state(usual), state(often))
    assert_same_state(state(usual), state(never))


def test_test_accuracy_does_not_depend_on_the_other_test_images(small_mnist: Mnist, tmp_path: Path):
    task = trained(small_mnist, tmp_path)
    task.model.eval()
    together = task.model(task.test_inputs)
    apart = torch.cat([task.model(part) for part in task.test_inputs.split([1, 99, 400])], 1)
    torch.testing.assert_close(together, apart)
    assert task.accuracy(together) == task.accuracy(apart)


def test_rows_state_accuracy_and_percentiles_of_every_network(small_mnist: Mnist, tmp_path: Path):
    task = trained(small_mnist, tmp_path)
    rows = list(read_rows(tmp_path / "bn.jsonl"))
    assert [(row["step"], row["seed"]) for row in rows] == [
        (step, seed) for step in sorted(evaluation_steps(130)) for seed in (0, 1)
    ]
    z = task.model.eval().last_sigmoid_input(task.test_inputs)[1].detach()
    expected = torch.tensor([torch.quantile(z[:, 2].double(), q) for q in (0.15, 0.5, 0.85)])
    actual = torch.tensor([curve[2] for curve in rows[-1]["percentiles"]], dtype=torch.float64)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)
    predicted = task.model(task.test_inputs)[1].argmax(-1)
    assert rows[-1]["test_accuracy"] == (predicted == task.test_labels).double().mean().item()
    assert {row["step"] for row in rows if "test_accuracy_population" in row} == {130}
    assert all(0 <= row["test_accuracy_population"] <= 1 for row in rows[-2:])


def test_a_network_without_bn_has_no_accuracy_with_population_statistics(small_mnist: Mnist, tmp_path: Path):
    trained(small_mnist, tmp_path, "plain", steps=5)
    assert list(read_rows(tmp_path / "plain.jsonl"))[-1]["test_accuracy_population"] is None


@pytest.mark.parametrize("training", [True, False])
def test_population_accuracy_puts_statistics_and_modes_back(small_mnist: Mnist, tmp_path: Path, training: bool):
    task = trained(small_mnist, tmp_path)
    task.model.train(training)
    before, norm = state(task), task.model.norms[0].norm
    buffers = norm.running_mean, norm.running_var
    accuracy = task.population_accuracy()
    assert_same_state(before, state(task))
    assert all(module.training == training for module in task.model.modules())
    assert (norm.running_mean, norm.running_var) == buffers
    assert norm.track_running_stats
    assert norm.momentum == OPTIONS.momentum
    assert accuracy == task.population_accuracy()


def test_population_accuracy_uses_algorithm_2(small_mnist: Mnist, tmp_path: Path):
    """Poisoned running averages change the running accuracy, and not the one by Algorithm 2."""
    task = trained(small_mnist, tmp_path)
    accuracy = task.population_accuracy()
    for norm in task.model.norms:
        norm.norm.running_mean.fill_(1e3)
    assert task.population_accuracy() == accuracy
    assert task.accuracy(task.model.eval()(task.test_inputs)) != accuracy


def test_a_diverged_network_leaves_nulls(small_mnist: Mnist, tmp_path: Path):
    trained(small_mnist, tmp_path, "plain", learning_rate=1e38)
    assert list(read_rows(tmp_path / "plain.jsonl"))[-1]["test_loss"] is None


@pytest.mark.parametrize("steps", [1, 2, 20, 999, 1000, 50_000])
def test_evaluations_include_the_first_and_the_last_step_and_a_uniform_grid(steps: int):
    assert {0, steps} <= grid_steps(steps) <= evaluation_steps(steps)
    assert max(evaluation_steps(steps)) == steps
    assert len(grid_steps(steps)) == min(GRID, steps) + 1
