"""The benchmark's arithmetic: equal budgets, paired differences, curves over all stages."""

import benchmark as b
import pytest


@pytest.mark.parametrize("kind", {kind for _, _, kind in b.ROWS.values()})
def test_every_row_has_the_same_number_of_updates(kind):
    steps = b.steps_of(kind, stage1=400, stage2=800)
    spent = {
        "one stage": lambda: steps["num_steps"],
        "stage 1 alone": lambda: steps["num_steps_stage1"],
        "halves": lambda: 2 * steps["num_steps"],
        "two stages": lambda: steps["num_steps_stage1"] + steps["num_steps"],
    }[kind]
    assert spent() == 1200


def made(row, seed, acc, **more):
    return {"row": row, "seed": seed, "test_acc": acc, "test_acc_median20": acc - 1, "seconds": 10.0, **more}


def test_table_pairs_runs_by_seed():
    runs = [made("ZeroMatch", 0, 90.0), made("ZeroMatch", 1, 80.0), made("AdaMatch", 1, 83.0), made("AdaMatch", 0, 91.0)]
    rows = {line.split("|")[1].strip(): line for line in b.table(runs, zero_shot=60.0).splitlines()}
    assert "| 87.0 ± 5.7 | +2.0 ± 1.4 | 86.0 | 10 |" in rows["AdaMatch"]  # differences 1 and 3
    assert "| 85.0 ± 7.1 |  | 84.0 | 10 |" in rows["ZeroMatch"]
    assert "60.0" in rows["zero-shot (the teacher itself)"]


def test_table_shows_the_outer_network_and_the_trusted_set():
    trusted = {"all": [100, 70.0], "confident": [60, 80.0], "trusted": [50, 90.0]}
    runs = [made("KD-FixMatch (CE)", s, 85.0, outer_acc=80.0 + s, trusted=trusted) for s in (0, 2)]
    text = b.table(runs, None)
    assert "| 81.0 ± 1.4 |" in text and "confident 60 (80.0 % right), trusted 50 (90.0 % right)" in text


def test_curves_add_the_steps_of_earlier_stages_and_leave_out_clustering():
    metrics = [
        {"stage": 1, "step": 10, "test/acc": 50.0}, {"stage": 1, "step": 20, "test/acc": 60.0},
        {"stage": 2, "step": 200, "train/agree": 0.9}, {"stage": 3, "step": 5, "test/acc": 55.0},
    ]  # fmt: skip
    points = b.continuous(metrics, "test/acc")
    assert [p for p in points if p[1] == p[1]] == [(10, 50.0), (20, 60.0), (25, 55.0)]
    assert len(points) == 4 and points[2][1] != points[2][1]  # a gap between the networks
