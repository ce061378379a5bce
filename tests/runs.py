"""What tests of whole runs share: a made-up teacher of digits, what the folder of a run holds."""

import json

import numpy as np
import torch

import common
import pseudolabel


def write_labels(path, header, probs):
    """A complete label file from probabilities [N, K]."""
    lines = [header, *pseudolabel.rows_of(torch.arange(len(probs)), torch.as_tensor(probs))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def digits_labels(folder, seed=0):
    """Arguments that name label files of both parts of digits, from a useless teacher."""
    data, rng, paths = common.load_data("digits", "data"), np.random.RandomState(seed), {}
    for split, name in (("train", "pseudolabels"), ("test", "pseudolabels_test")):
        probs = rng.dirichlet(np.ones(10), len(data.part(split)))
        header = pseudolabel.header_of(data, split, "made up", "none")
        write_labels(folder / f"{split}.jsonl", header, probs)
        paths[name] = str(folder / f"{split}.jsonl")
    return paths


def digits_views(part="train"):
    split = common.load_data("digits", "data").part(part)
    return common.Views(split, common.preset_of("digits"), "cnn", torch.device("cpu"))


def new_student(key="weights", seed=0):
    """The small CNN for digits as a script starts it."""
    common.seed_step(seed, key, 0)
    return common.build_student("cnn", common.PRESETS["digits"], 10).train()


def save_untrained(folder, backbone, preset, classes, num_extra=0):
    """A student's folder without training; returns the student."""
    student = common.build_student(backbone, preset, len(classes), num_extra).eval()
    config = student.config | {"dataset": "any", "classes": classes}
    folder.parent.mkdir(parents=True, exist_ok=True)
    common.save_student(folder, student, config)
    return student


def only_run(folder):
    (args,) = folder.glob("*/args.json")
    return args.parent


def checkpoint(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def weights(run):
    """Trained and averaged weights."""
    state = checkpoint(run)
    return {f"{part}.{k}": v for part in ("model", "ema") for k, v in state[part].items()}


def metrics(run):
    """Whole rows of metrics.jsonl without times."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().split("\n")[:-1])
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def column(run, name, stage=None):
    """Values of one metric, perhaps of one stage alone."""
    rows = (row for row in metrics(run) if stage in (None, row["stage"]))
    return [row[name] for row in rows if name in row]


def differences(one, other):
    """What two runs do not share, of weights, other state, metrics and the saved student."""
    a, b = weights(one), weights(other)
    names = [k for k in a | b if not (k in a and k in b and torch.equal(a[k], b[k]))]
    a, b = checkpoint(one), checkpoint(other)
    kept = [k for k in ("p_lb", "p_ulb", "window", "y_outer") if a.get(k, b.get(k)) is not None]
    names += [name for name in kept if not torch.equal(a[name], b[name])]
    names += [] if a["history"] == b["history"] else ["history"]
    names += [] if metrics(one) == metrics(other) else ["metrics"]
    a, b = ((run / "student/model.safetensors").read_bytes() for run in (one, other))
    return names + ([] if a == b else ["student"])


def dying_at(stage, step):
    """In place of Run.log: dies without notice at a step, after its update."""
    real = common.Run.log

    def log(self, at_stage, at_step, *args, **values):
        if (at_stage, at_step) == (stage, step):
            raise RuntimeError("killed")
        return real(self, at_stage, at_step, *args, **values)

    return log


def other_hidden_labels(monkeypatch, script, num_labels, change):
    """From now on `script` reads digits with `change` applied to the labels it must not use."""
    real = common.load_data
    drawn = common.draw_labeled(real("digits", "").train.y, num_labels, 10, seed=0)

    def changed(*args):
        data = real(*args)
        hidden = np.setdiff1d(np.arange(len(data.train)), drawn)
        data.train.y[hidden] = change(data.train.y[hidden])
        return data

    monkeypatch.setattr(script, "load_data", changed)
    monkeypatch.setattr(script, "draw_labeled", lambda *given: drawn)


def shuffled(y):
    return np.random.RandomState(1).permutation(y)
