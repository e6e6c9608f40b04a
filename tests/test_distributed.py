"""Several processes train, measure and predict what one process does.

The runs are those of ``distributed_runs.py``; here they are compared.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_runs import PROCESSES, SCENARIOS, policies, runs
from tiny import make_classifier

import dynadapter.training.module  # noqa: F401  (what a checkpoint may hold)

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    program = Path(__file__).with_name("distributed_runs.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return folder


def results(folder: Path, name: str) -> dict[tuple[int, int], Any]:
    """Return the results of each process by (processes, rank)."""
    return {
        (processes, rank): torch.load(folder / f"{name}.{processes}.{rank}.pt", weights_only=False)
        for processes in PROCESSES
        if runs(name, processes)
        for rank in range(processes)
    }


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the largest difference between two states, relative to the largest element of a tensor."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max()) for name in b)


def test_all_scenarios_ran(folder: Path) -> None:
    assert all(results(folder, name) for name in SCENARIOS)


# ---- training


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("plain", 1e-6),
        ("a_weight_of_zero", 1e-6),
        ("accumulated_and_clipped", 1e-6),
        ("one_batch_that_does_not_divide", 1e-6),
        ("masked", 2e-5),  # Adam enlarges rounding where a gradient is small
        ("averaged", 1e-6),
        ("bfloat16", 1e-2),  # sums of 8 bits, in another order
        ("float16", 1e-3),  # of 11 bits
        ("drawn", 1.0),  # each process draws its own dropout and mixing
    ],
)
def test_weights_equal_one_process(name: str, tolerance: float, folder: Path) -> None:
    states = {where: result["state"] for where, result in results(folder, name).items()}
    for (processes, _), state in states.items():
        assert difference(state, states[processes, 0]) == 0  # all processes hold the same
        assert difference(state, states[1, 0]) <= tolerance
    assert difference(states[1, 0], make_classifier().state_dict()) > 1e-2 or name == "drawn"


def test_logs_are_means_over_processes(folder: Path) -> None:
    losses = {where: result["losses"] for where, result in results(folder, "plain").items()}
    assert len(set(losses[1, 0])) == 6
    assert all(seen == pytest.approx(losses[1, 0], rel=1e-6) for seen in losses.values())


def test_gradients_of_16_bits_are_scaled(folder: Path) -> None:
    for result in results(folder, "float16").values():
        assert (result["precision"], result["scale"]) == ("16-mixed", 256.0)  # no step was skipped


def test_average_keeps_the_frozen_backbone(folder: Path) -> None:
    averaged = results(folder, "averaged")
    assert all(result["frozen"] for result in averaged.values())
    assert difference(averaged[1, 0]["state"], results(folder, "plain")[1, 0]["state"]) > 1e-3
    for result in averaged.values():  # the average is what was measured
        assert {k: float(v) for k, v in result["val"].items()} == pytest.approx(
            {k: float(v) for k, v in averaged[1, 0]["val"].items()}, rel=1e-5
        )


def test_accumulation_keeps_the_global_batch(folder: Path) -> None:
    assert {result["steps"] for result in results(folder, "accumulated_and_clipped").values()} == {6}


def test_resume_with_other_process_counts(folder: Path) -> None:
    whole = results(folder, "plain")[1, 0]["state"]
    for result in results(folder, "resumed").values():
        assert difference(result["state"], whole) <= 1e-6


# ---- measures


@pytest.mark.parametrize(
    "name", ["measured_on_twentythree", "measured_on_two", "measured_in_fit", "with_broken_logits"]
)
def test_metrics_equal_one_process(name: str, folder: Path) -> None:
    measured = results(folder, name)
    assert len(measured[1, 0]) > 10
    for result in measured.values():
        assert result == pytest.approx(measured[1, 0], rel=1e-6, abs=1e-7, nan_ok=True)


def test_every_sample_counts_once(folder: Path) -> None:
    for name, samples in (("measured_on_twentythree", 23), ("measured_on_two", 2)):
        for result in results(folder, name).values():
            shares = [value * samples for key, value in result.items() if re.search("/share|/acc(?!_of)", key)]
            assert len(shares) == 2 * (4 + 2 * 4)
            assert all(value == pytest.approx(round(value), abs=1e-4) for value in shares)


# ---- mistakes


def test_nonfinite_loss_stops_all_processes(folder: Path) -> None:
    for (processes, _), result in results(folder, "an_image_that_is_not_finite").items():
        where = " in process 0" if processes > 1 else ""
        assert result["said"].startswith(
            f"the training loss is not finite at step 4 (epoch 1, exit 1, 2, 3, 1 of {6 // processes} images{where}: "
            "image 17); lower the learning rate"
        )
        assert "\n" not in result["said"]
        assert len(result["losses"]) == result["saved"] == 4


def test_nonfinite_weights_are_not_saved(folder: Path) -> None:
    for result in results(folder, "weights_that_are_not_finite").values():
        assert result["finite"]
        assert result["said"].startswith(
            "1 trained tensors are not finite after step 2, net.backbone.head.weight among them; the earlier"
        )


def test_indivisible_global_batch_is_refused(folder: Path) -> None:
    for (processes, _), said in results(folder, "a_global_batch_that_does_not_divide").items():
        wanted = f"global_batch_size=7 does not divide by {processes} process(es) x 1 accumulated batch(es); give a"
        assert said.startswith(wanted if processes > 1 else "no error")


# ---- sharded


def test_sharded_training_is_equal(folder: Path) -> None:
    measured = results(folder, "sharded")
    assert len(measured[1, 0]["numbers"]) > 2 * (10 + len(policies()) * 5)
    for result in measured.values():
        assert result["numbers"] == pytest.approx(measured[1, 0]["numbers"], rel=1e-5)
        assert result["gmacs"] == pytest.approx(measured[1, 0]["gmacs"])


@pytest.mark.parametrize("name", ["sharded", "sharded_resumed"])
def test_sharded_checkpoint_equals_a_single(name: str, folder: Path) -> None:
    one, two = (torch.load(folder / f"{name}.{n}.ckpt", weights_only=True) for n in (1, 2))
    assert one.keys() == two.keys()
    assert str(one["dynadapter"]) == str(two["dynadapter"])  # one of its values is a tensor
    assert difference(two["state_dict"], one["state_dict"]) <= 1e-6
    module = make_classifier()
    module.load_state_dict(two["state_dict"])  # strictly
    moments, same = (
        dict(enumerate(state["exp_avg"] for _, state in sorted(held["optimizer_states"][0]["state"].items())))
        for held in (two, one)
    )  # numbered among all tensors, or among those that are trained
    assert difference(moments, same) <= 1e-4


def test_sharded_files_resume(folder: Path) -> None:
    states = results(folder, "sharded_files")
    for state in states.values():
        assert difference(state, states[1, 0]) <= 1e-6


def test_unshardable_parts_are_named(folder: Path) -> None:
    for rank in (0, 1):
        said = results(folder, "sharded_mistakes")[2, rank]
        assert all("\n" not in line for line in said)
        assert said[0].startswith("BidirectionalSparsity masks whole tensors, and here they are sharded;")
        assert said[1].startswith("WeightAverage needs whole tensors, here they are sharded;")
        assert said[2].startswith("tensor_parallel_size=2 is not supported")
        assert said[3].startswith("the checkpoint does not fit this model: Missing: NAME. Unknown: other. Give the")
