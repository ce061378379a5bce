"""One-line faults of the methods and their loops, each of which some test has to notice.

Run by hand: python tests/mutations.py [WORD], which takes only the faults with WORD in file or
name. Each fault is put into a copy of the project, where the tests of the loops run first, then
those of the script. Prints a table of faults and the tests that found them. Exit code 1 if one was
not found, or if its old text is not in the file exactly once."""

import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
Z, A, K, C = "zeromatch.py", "adamatch.py", "kd_fixmatch.py", "common.py"
REFERENCE = "tests/test_reference.py"
TESTS = {  # of a file: choice among the tests of the loops, further tests
    Z: ("not adamatch and not kd_fixmatch", "tests/test_zeromatch.py"),
    A: ("not zeromatch and not kd_fixmatch", "tests/test_adamatch.py"),
    K: ("not zeromatch and not adamatch", "tests/test_kd_fixmatch.py"),
    C: ("", "tests/test_common.py", "tests/test_backbones.py"),
}
STEP, AVERAGE = "        scaler.step(optimizer)\n", "        ema.update_parameters(student)\n"
UPDATE = STEP + "        scaler.update()\n" + AVERAGE
EARLY = AVERAGE + STEP + "        scaler.update()\n"
SHARED = [  # in several scripts, word for word: scripts, name, old text, new text
    ((Z, A, K), "threshold must be passed", "max_prob >= threshold", "max_prob > threshold"),
    ((Z, A, K), "loss_u over kept rows only", "* mask).mean()", "* mask).sum() / mask.sum()"),
    ((Z, A, K), "warm-up one step ahead", "return step / warmup", "return (step + 1) / warmup"),
    ((Z, A, K), "half cosine", "math.cos(7 / 16", "math.cos(1 / 2"),
    ((Z, A, K), "cosine from step 0", "math.pi * (step - warmup_steps)", "math.pi * step"),
    ((Z, A, K), "early averages are long", "avg_fn(min(decay, (1 + t) / (10 + t)))",
     "avg_fn(decay)"),
    ((Z, A, K), "average: decay has no limit", "avg_fn(min(decay, (1 + t) / (10 + t)))",
     "avg_fn((1 + t) / (10 + t))"),
    ((Z, A, K), "average one update ahead", "(1 + t) / (10 + t)))(", "(2 + t) / (11 + t)))("),
    ((Z, A, K), "average without batch statistics", ", use_buffers=True", ""),
    ((Z, A), "marginal decay swapped", "else decay * p + (1 - decay) * mean",
     "else (1 - decay) * p + decay * mean"),
    ((Z, A), "alignment upside down", "(p_lb + 1e-6) / (p_ulb + 1e-6)",
     "(p_ulb + 1e-6) / (p_lb + 1e-6)"),
    ((Z, A), "alignment with another constant", "(p_lb + 1e-6) / (p_ulb + 1e-6)",
     "(p_lb + 1e-5) / (p_ulb + 1e-5)"),
    ((Z, A), "threshold from the surest row", "max(dim=1).values.mean()", "max()"),
    ((Z, A), "p_ulb forgets", "update_marginal(p_ulb, probs", "update_marginal(None, probs"),
    ((Z, A), "p_lb forgets", "update_marginal(p_lb, probs", "update_marginal(None, probs"),
    ((Z, A), "p_lb starts at batch 1", 'p_lb", torch.full((K,), 1 / K, device=run.device)',
     'p_lb"'),
    ((Z, A), "p_ulb starts uniform", 'p_ulb = state.get("p_ulb")', "p_ulb = p_lb"),
    ((Z, A), "threshold from aligned rows", "relative_threshold(probs_lb,",
     "relative_threshold(align(probs_lb, p_lb, p_ulb),"),
    ((Z, A), "threshold from unlabeled rows", "relative_threshold(probs_lb,",
     "relative_threshold(probs_ulb_w,"),
    ((Z, A), "strong view's label", "logits_ulb_w.detach().softmax",
     "logits_ulb_s.detach().softmax"),
    ((Z, A), "p_ulb keeps all graphs", "logits_ulb_w.detach().softmax", "logits_ulb_w.softmax"),
    ((Z, A), "loss_u on weak views", "loss_u = loss_consistency(logits_ulb_s,",
     "loss_u = loss_consistency(logits_ulb_w,"),
    ((Z, K), "lambda_u ignored", "loss_s + args.lambda_u * loss_u", "loss_s + loss_u"),
    ((Z, K), "strong labeled view", "= train.weak(idx_lb), train", "= train.strong(idx_lb), train"),
    ((Z, K), "weak view in place of strong", "train.weak(idx_ulb), train.strong(idx_ulb)",
     "train.weak(idx_ulb), train.weak(idx_ulb)"),
    ((A, K), "averages before the update", UPDATE, EARLY),
    ((A, K), "one learning rate", 'lr * group["lr_scale"]', "lr"),
    ((Z, A, K), "returns trained weights", "return ema.module\n", "return student\n"),
]  # fmt: skip
MUTATIONS = [(file, *fault) for files, *fault in SHARED for file in files] + [
    # file, name, old text, new text
    (Z, "stage 2 starts from trained weights", "student.load_state_dict(evaluated",
     "dict(evaluated"),
    (Z, "D1: stage 1 hands on trained weights", "return ema.module  # the",
     "return student  # the"),
    (Z, "stage 1: averages before the update", UPDATE + "\n        run.log(1",
     EARLY + "\n        run.log(1"),
    (Z, "stage 2: averages before the update", UPDATE + "\n        run.log(\n",
     EARLY + "\n        run.log(\n"),
    (Z, "stage 1 evaluates trained weights", "run.evaluate(1, step, num_steps, ema.module",
     "run.evaluate(1, step, num_steps, student"),
    (Z, "stage 2 evaluates trained weights", "run.evaluate(2, step, args.num_steps, ema.module",
     "run.evaluate(2, step, args.num_steps, student"),
    (Z, "stage 1 on strong views", "net(train.weak(idx))", "net(train.strong(idx))"),
    (Z, "stage 1 on small batches", 'args.uratio * args.batch_size, args.seed, "stage 1"',
     'args.batch_size, args.seed, "stage 1"'),
    (Z, "stage 1 on the schedule of stage 2", "args.num_steps_stage1\n", "args.num_steps\n"),
    (Z, "no answer is class 0", "y_zs, reduction=\"none\", ignore_index=-1)",
     "y_zs.clamp(min=0), reduction=\"none\")"),
    (Z, "mean over answered rows", "reduction=\"none\", ignore_index=-1).mean()",
     "ignore_index=-1)"),
    (Z, "alpha_t from the second step", "step / max(1, num_steps - 1) if",
     "(step + 1) / max(1, num_steps) if"),
    (Z, "alpha_t never reaches 1", "step / max(1, num_steps - 1) if", "step / num_steps if"),
    (Z, "lambda_p ignored", "args.lambda_p * alpha_t * loss_kd", "alpha_t * loss_kd"),
    (Z, "alpha_t ignored", "args.lambda_p * alpha_t * loss_kd", "args.lambda_p * loss_kd"),
    (Z, "loss_kd on strong views, too", "logits_kd[: B + B_u], torch.cat([y_zs[idx_lb], y",
     "logits_kd, torch.cat([y_zs[idx_lb], y_zs[idx_ulb], y"),
    (Z, "loss_kd on labeled rows only",
     "logits_kd[: B + B_u], torch.cat([y_zs[idx_lb], y_zs[idx_ulb]])",
     "logits_kd[:B], y_zs[idx_lb]"),
    (Z, "loss_kd on the main head", "loss_distillation(logits_kd[:", "loss_distillation(logits[:"),
    (Z, "no alignment", "hard_labels(aligned, c_tau)", "hard_labels(probs_ulb_w, c_tau)"),
    (Z, "alignment after the threshold", "= hard_labels(aligned, c_tau)",
     "= aligned.argmax(dim=1), hard_labels(probs_ulb_w, c_tau)[1]"),
    (Z, "label before alignment", "= hard_labels(aligned, c_tau)",
     "= probs_ulb_w.argmax(dim=1), hard_labels(aligned, c_tau)[1]"),
    (Z, "p_lb keeps all graphs", "logits_lb.detach().softmax", "logits_lb.softmax"),
    (Z, "p_lb updated after use", "p_lb = mean_over_processes(update",
     "before, p_lb = p_lb, mean_over_processes(update", "p_lb if prior", "before if prior"),
    (Z, "no agreement", "mask.clamp(min=alpha_t), mask", "mask, mask"),
    (Z, "prior ignored", "p_lb if prior is None else prior", "p_lb"),
    (Z, "teacher's shares without the labels", " + labels / labels.sum()", ""),
    (Z, "stage 2: one learning rate", 'anneal)\n        for group in optimizer.param_groups:\n'
     '            group["lr"] = lr * group["lr_scale"]',
     'anneal)\n        for group in optimizer.param_groups:\n            group["lr"] = lr'),
    (A, "no alignment", "align(probs_ulb_w, p_lb, p_ulb), c_tau", "probs_ulb_w, c_tau"),
    (A, "u_weight one step ahead", "math.pi * step / num", "math.pi * (step + 1) / num"),
    (A, "u_weight stays at 1", "1 + (lambda_u - 1) * (1 - half_cosine)", "1"),
    (A, "u_weight falls to lambda_u at once", "(lambda_u - 1) * (1 - half_cosine)",
     "(lambda_u - 1)"),
    (A, "u_weight ignored", "+ u_weight * loss_u\n            values",
     "+ loss_u\n            values"),
    (A, "one random number per row", "uniform(B, K), uniform(B, K)",
     "uniform(B, 1), uniform(B, 1)"),
    (A, "one number for both views", "uniform(B, K), uniform(B, K)", "*2 * [uniform(B, K)]"),
    (A, "interpolation from the other end",
     "return logits_joint + lam * (logits_alone - logits_joint)",
     "return logits_alone + lam * (logits_joint - logits_alone)"),
    (A, "no gradient through the single pass", "return logits_joint + lam * (logits_alone -",
     "return logits_joint + lam * (logits_alone.detach() -"),
    (A, "the same random numbers every step", '"adamatch", step)', '"adamatch", 0)'),
    (A, "labels of both views mixed up", "y_lb.repeat(2)", "y_lb.repeat_interleave(2)"),
    (A, "usb: lambda_u ignored", "if paper else args.lambda_u", "if paper else 1.0"),
    (A, "window of 127", "torch.full((128, K)", "torch.full((127, K)"),
    (A, "window keeps the first place", "window[step % len(window)]", "window[0]"),
    (A, "window forgets", "p_ulb = window.mean(dim=0)", "p_ulb = probs_ulb_w.mean(dim=0)"),
    (A, "single pass moves batch statistics", "buffer.data.copy_(value)", "pass"),
    (A, "two weak labeled views", "join([x_lb, train.strong(idx_lb)])",
     "join([x_lb, train.weak(idx_lb)])"),
    (A, "threshold from both labeled views", "logits_lb[:B].detach()", "logits_lb.detach()"),
    (A, "p_lb keeps all graphs", "logits_lb[:B].detach()", "logits_lb[:B]"),
    (A, "paper: tau of USB", '"tau": 0.9, "m', '"tau": 0.95, "m'),
    (A, "paper: decay 0.99", '"marginal_decay": 0.999}', '"marginal_decay": 0.99}'),
    (A, "strong view's label, no statistics", "logits_ulb_w = forward(net, x_ulb_w, t",
     "logits_ulb_w = forward(net, x_ulb_s, t"),
    (A, "other examples' teacher labels", "torch.cat([idx_lb, idx_ulb, idx_ulb])",
     "torch.cat([idx_ulb, idx_lb, idx_ulb])"),
    (A, "no answer is the last class", "one_hot = torch.eye(K + 1, K", "one_hot = torch.eye(K, K"),
    (A, "evaluates trained weights", "ema.module, test)", "student, test)"),
    (K, "tau in stage 3", "else (args.tau_inner,", "else (args.tau,"),
    (K, "robust loss in stage 1", '(args.tau, "ce") if', "(args.tau, args.unsup_loss) if"),
    (K, "Heuristic 1 reversed", "by_outer = (mask == 0) & (y_outer >= 0)",
     "by_outer = y_outer >= 0"),
    (K, "class 0 is never trusted", "(y_outer >= 0)", "(y_outer > 0)"),
    (K, "trusted rows stay masked", "torch.where(by_outer, 1.0, mask)", "mask"),
    (K, "own label on trusted rows", "torch.where(by_outer, y_outer, pseudo_label)",
     "pseudo_label"),
    (K, "SCE weights swapped",
     "return alpha * F.cross_entropy(logits, target, reduction=\"none\") + beta",
     "return beta * F.cross_entropy(logits, target, reduction=\"none\") + alpha"),
    (K, "log 0 is log 1e-3", "clamp(min=1e-4)", "clamp(min=1e-3)"),
    (K, "probabilities clamped at 1e-6", "clamp(min=1e-7)", "clamp(min=1e-6)"),
    (K, "MAE without 2", "return 2 - 2 *", "return 1 -"),
    (K, "NCE by the mean", "log_softmax(dim=1).sum(dim=1)", "log_softmax(dim=1).mean(dim=1)"),
    (K, "SCE over used rows only", "alpha, beta) * used).mean()",
     "alpha, beta) * used).sum() / used.sum()"),
    (K, "MAE over used rows only", "target) * used).mean()", "target) * used).sum() / used.sum()"),
    (K, "DEC: target q", "q.square() / q.sum(dim=0)", "q / q.sum(dim=0)"),
    (K, "DEC: target not divided by sizes", "q.square() / q.sum(dim=0)", "q.square()"),
    (K, "DEC: target has a gradient", "target_distribution(q.detach())", "target_distribution(q)"),
    (K, "DEC: Gaussian kernel", "1 / (1 + torch.cdist(z, centroids).square())",
     "(-torch.cdist(z, centroids).square()).exp()"),
    (K, "DEC: distance not squared", "centroids).square())", "centroids))"),
    (K, "DEC: KL over all elements", 'reduction="batchmean"', 'reduction="mean"'),
    (K, "DEC: another rate", "DEC_LR = 200, 3.0", "DEC_LR = 200, 2.0"),
    (K, "DEC: no momentum", "DEC_LR, momentum=0.9)", "DEC_LR)"),
    (K, "DEC: features not centered", "features - features.mean(dim=0)", "features"),
    (K, "DEC: features not scaled", "features = features / features.square()", "features.square()"),
    (K, "DEC: clusters without projection",
     "    q = soft_assignment(features @ dec[\"projection\"], dec[\"centroids\"])\n    return",
     "    q = soft_assignment(features, dec[\"centroids\"])\n    return"),
    (K, "DEC: clusters keep their numbers", "present[torch.from_numpy(matched).to(label.device)",
     "present[torch.arange(K)"),
    (K, "trusted filter inverted", "confident * (cluster == label)",
     "confident * (cluster != label)"),
    (K, "trusted without confidence", "confident * (cluster == label)",
     "0 * confident + (cluster == label)"),
    (K, "tau in place of tau_select", "hard_labels(probs, args.tau_select)",
     "hard_labels(probs, args.tau)"),
    (K, "inner continues the outer network", "outer, inner = networks",
     "outer = inner = networks[0]"),
    (K, "inner starts like the outer", '("weights", "inner weights")', '("weights", "weights")'),
    (K, "T_u not handed over", "test, args, run, y_outer)", "test, args, run)"),
    (K, "strong view's label", "hard_labels(logits_ulb_w.d", "hard_labels(logits_ulb_s.d"),
    (K, "strong view's label, no statistics", "logits_ulb_w = forward(net, x_ulb_w, run)",
     "logits_ulb_w = forward(net, x_ulb_s, run)"),
    (K, "loss_u on weak views", "loss_robust(unsup_loss, logits_ulb_s,",
     "loss_robust(unsup_loss, logits_ulb_w,"),
    (K, "evaluates trained weights", "args.num_steps, ema.module, test)",
     "args.num_steps, student, test)"),
    (C, "predictions on weak views", "student(views.plain(idx), views",
     "student(views.weak(idx), views"),
    (C, "predictions in training mode", "parts = student.eval(), []",
     "parts = student.train(), []"),
    (C, "momentum without Nesterov", ", nesterov=True", ""),
    (C, "momentum 0.8", "momentum=0.9, n", "momentum=0.8, n"),
    (C, "Adam with L2", "torch.optim.AdamW(groups", "torch.optim.Adam(groups"),
    (C, "AdamW with another beta", "torch.optim.AdamW(groups",
     "torch.optim.AdamW(groups, betas=(0.9, 0.99)"),
    (C, "decay of biases and norms", "p.ndim <= 1 or", "p.ndim < 1 or"),
    (C, "decay of positions", "|position_embeddings|pos_emb", "|position_embeddings"),
    (C, "no decay of matrices", "0.0 if plain else weight_decay", "weight_decay if plain else 0.0"),
    (C, "layer decay one layer short", "(len(blocks) + 1 - layer)", "(len(blocks) - layer)"),
    (C, "layers counted from 0", "enumerate(blocks, 1)", "enumerate(blocks)"),
    (C, "heads decay, too", 'startswith("encoder.") else 1.0',
     'startswith("encoder.") else layer_decay'),
    (C, "heads shared", "self.kd_head = copy.deepcopy(self.head)", "self.kd_head = self.head"),
    (C, "auxiliary head starts as the main one", "            layer.reset_parameters()",
     "            pass"),
    (C, "batches: overlap", "first = step * batch + RANK", "first = step + RANK"),
    (C, "batches: from the start of a pass", "[first % n :][:rows]", "[:rows]"),
    (C, "batches: one order for all passes", "permutation(n, seed, stream, number)",
     "permutation(n, seed, stream)"),
    (C, "batches: one order for all streams", "permutation(n, seed, stream, number)",
     "permutation(n, seed, number)"),
]  # fmt: skip


def run_pytest(folder, out, arguments):
    """In a process of its own, which inherits the loaded libraries: that saves most of the time."""
    os.chdir(folder)
    with open(out, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--rootdir", ".", *arguments]))


def run_tests(folder, file, name=""):
    """The first failing test of a copy of the project, or None; "? ..." if none could run."""
    choice, *own = TESTS[file]
    out = folder.with_name("output")
    loops = [REFERENCE, "-k", choice]
    # The reference takes the numbers of a batch from common.py and cannot judge them.
    for arguments in [own] if name.startswith("batches") else [loops, own]:
        process = multiprocessing.get_context("fork").Process(
            target=run_pytest, args=(folder, out, arguments)
        )
        process.start()
        process.join(300)
        if process.is_alive():
            process.kill()
            return "a limit of five minutes"
        said = out.read_text(errors="replace")
        if found := re.search(r"^FAILED tests/(\S+?\.py::\w+(\[.*?\](?= - |$))?)", said, re.M):
            return found[1]
        if process.exitcode:
            return "? " + said[-500:]
    return None


def main(word=""):
    sys.dont_write_bytecode = True  # a file that changes twice a second needs no cache
    sys.path.insert(0, str(ROOT))
    import pseudolabel  # noqa: F401, loads torch and all else

    sys.path.pop(0)
    for name in ("pseudolabel", "common"):
        del sys.modules[name]
    left = []
    with tempfile.TemporaryDirectory() as folder:
        copy, ignored = Path(folder) / "project", (".git", "__pycache__", "data", "runs", ".venv")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*ignored))
        chosen = [row for row in MUTATIONS if word in f"{row[0]} {row[1]}"]
        for file in dict.fromkeys(row[0] for row in chosen):
            if failed := run_tests(copy, file):
                sys.exit(f"without any fault: {failed}")
        print("| fault | found by |\n|---|---|")
        for file, name, *changes in chosen:
            original = text = (copy / file).read_text()
            for old, new in zip(changes[::2], changes[1::2], strict=True):
                count, text = text.count(old), text.replace(old, new)
                if count != 1:
                    left.append(f"{file}: {name}: old text found {count} times")
            compile(text, file, "exec")
            (copy / file).write_text(text)
            found = run_tests(copy, file, name) or "NOTHING"
            (copy / file).write_text(original)
            if found[0] in "?N":
                left.append(f"{file}: {name}: {found}")
            print(f"| {file}: {name} | {found} |", flush=True)
    print(f"\n{len(chosen)} faults, {len(left)} left", *left, sep="\n")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
