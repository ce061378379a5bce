"""Tries every text and image model type of the installed transformers as a backbone: a tiny random
model is made from its configuration, adamatch.py trains it for two steps on made-up texts or
pictures, and the saved student is read again. Run by hand; nothing is downloaded.

    python tests/sweep.py                             all, about ten minutes on one CPU core
    python tests/sweep.py --kind image --only vit swin --output table.md

Outcomes
  trained         two steps; the student read again gives exactly the logits of the trained one
  trained, but    without any error, but what the student says cannot be relied on
  refused         a UserError: one line for the user
  TRACEBACK       any other error, a crash, or no end within --timeout seconds
  not made        no tiny model could be made, which says nothing about the product
"""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before torch
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import tiny_models
import torch
import transformers as t
import tyro
from PIL import Image
from transformers.models.auto import modeling_auto as auto

import adamatch
import common

SIDE, MOST, MEMORY = 32, 30_000_000, 8 * 2**30  # pixels; parameters; bytes of one trial
WORDS = [a + b for a in "bcdfghjk" for b in "aeiouy"]
SMALL = {  # pattern of a number's name in a configuration: its value; in a list, of each member
    r"vocab_size|\w+_vocab_size|vocab_size_\w+|\w+_group_vocab": 384,
    r"patch_size|rotary_dim|qk_(rope|nope)_head_dim": 8,
    r"(\w+_)?head_dim|d_kv|(\w+_)?d_head|dim_head|kv_channels|\w+_rank|projection_dim": 16,
    r"(num_|n_)?(\w+_)?layers?|depths?|num_blocks|num_block_repeats|blocks_per_stage": 2,
    r"(num_|n_)?(\w+_)?heads?|num_attention_heads_per_stage|num_experts_per_tok(en)?|moe_k": 2,
    r"d_model|n_embd|dim|\w*(hidden_sizes?|hidden_dim|embed_dim|emb_dim)|embedding_size": 32,
    r"\w*(intermediate_size|ffn_dim|ffn_hidden_size|feedforward_dim)|d_ff|d_inner|mlp_dim": 64,
    r"max_position_embeddings|n_positions|max_seq_len|\w*sliding_window": 128,
    r"num_experts|num_local_experts|n_routed_experts|moe_num_experts": 4,
    r"n_group|topk_group|n_groups|num_groups": 1,
    r"\w*image_size|input_size": SIDE,
    r"initializer_range|init_std": 0.1,  # more than usual, so that logits differ by example
}
HEAD, MAMBA, MROPE = {"head_dim": 8}, {"mamba_d_head": 32}, {"hidden_size": 256}
SWIN = {"depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
NARROW = {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320}
EXTRA: dict[str, dict[str, Any]] = {  # what the names above do not say, by model type
    "align_vision_model": NARROW | {"initializer_range": 1.0}, "axk1": HEAD, "deepseek_v3": HEAD,
    "efficientnet": NARROW | {"initializer_range": 1.0}, "longcat_flash": HEAD, "youtu": HEAD,
    "swin": SWIN, "donut-swin": SWIN, "maskformer-swin": SWIN, "glm_image_text": {"head_dim": 64},
    "bamba": MAMBA | {"attn_layer_indices": [1]}, "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "bridgetower_vision_model": {"hidden_size": 64}, "cosmos3_edge_text": {"head_dim": 128},
    "chameleon": {"vocabulary_map": {"<image>": 5}}, "cvt": {"depth": [1, 2, 3]},
    "deepseek_v2": {"num_experts_per_tok": 2}, "esm": {"vocab_size": 384, "pad_token_id": 0},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"intermediate_size": [64, 64], "num_kv_shared_layers": 0},
    "glm4v_text": {"hidden_size": 128, "head_dim": 64}, "glm_ocr_text": {"head_dim": 64},
    "glm4v_moe_text": {"head_dim": 128}, "paddleocr_vl_text": {"head_dim": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]}, "levit": {"patch_size": 16},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]}, "qwen2_vl_text": MROPE,
    "hunyuan_v1_dense": {"head_dim": 16}, "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1}, "ministral": {"head_dim": 16},
    "laguna": {"num_attention_heads_per_layer": [2, 2]}, "nemotron": {"num_key_value_heads": 2},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4}, "lilt": {"hidden_size": 48},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]}, "qwen2_5_vl_text": MROPE,
    "llama4_text": {"no_rope_layers": [1, 0], "moe_layers": [1]}, "mamba2": {"head_dim": 32},
    "llama4_vision_model": dict.fromkeys(["projector_input_dim", "projector_output_dim"], 32) |
    {"intermediate_size": 128}, "mistral_large4_text": {"kv_source_layers": [0, 1]},
    "mobilebert": {"true_hidden_size": 128, "hidden_size": 128},
    "mobilevit": {"initializer_range": 0.3}, "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "textnet": {"hidden_sizes": [64] * 5},
}  # fmt: skip


def small(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a configuration's class, from its defaults, that make the model small."""
    made: dict[str, Any] = {}
    for name, value in config.items():
        new = next((new for key, new in SMALL.items() if re.fullmatch(key, name)), None)
        if isinstance(value, dict) and value.get("model_type"):
            made[name] = small(value) | {"model_type": value["model_type"]}
        elif name.endswith("token_id") and value is not None:
            made[name] = [1] if isinstance(value, list) else int(name != "pad_token_id")
        elif name in ("layer_types", "layers_block_type") and value:  # two kinds of layers
            made[name] = [value[0], next((one for one in value if one != value[0]), value[0])]
        elif new is not None and type(value) in (int, float):
            made[name] = min(new, value) if type(value) is int else new
        elif new is not None and isinstance(value, list | tuple) and type(value[0]) is int:
            made[name] = [min(new, one) for one in value]
    return made | EXTRA.get(config["model_type"], {})


def base_class(model_type: str) -> Any:
    """The class that AutoModel makes of a model type."""
    found = auto.MODEL_MAPPING[t.CONFIG_MAPPING[model_type]]
    return found[0] if isinstance(found, tuple) else found


def make_model(kind: str, model_type: str, folder: Path) -> None:
    """A folder with a tiny random model; for texts also a tokenizer."""
    config_type, made = t.CONFIG_MAPPING[model_type], base_class(model_type)
    config = config_type(**small(config_type().to_dict()))
    with torch.device("meta"):  # counts before memory is used
        size = sum(p.numel() for p in made(config).parameters())
    if size > MOST:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    made(config).save_pretrained(folder)
    if kind == "text":
        tiny_models.tokenizer(folder, ends=True)


def make_data(folder: Path) -> None:
    """texts.csv and pictures/train/<class>/: 20 examples of each of two classes."""
    rng, rows = np.random.RandomState(0), ["text,label"]
    for k, label in enumerate(("one", "two")):
        pictures = folder / "pictures" / "train" / label
        pictures.mkdir(parents=True)
        for i in range(20):
            words = rng.choice(WORDS[18 * k : 18 * k + 30], rng.randint(2, 20))
            rows.append(f"{' '.join(words)},{label}")
            pixels = rng.randint(0, 128, (SIDE, SIDE, 3)) + 100 * k
            Image.fromarray(pixels.astype(np.uint8)).save(pictures / f"{i}.png")
    (folder / "texts.csv").write_text("\n".join(rows))


def kinds_of(model_type: str) -> tuple[list[str], str]:
    """(text, image or both; why it is neither)."""
    try:
        made = base_class(model_type)
        reads, sees = made.main_input_name, set(np.ravel(made.input_modalities))
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        return [], type(error).__name__
    mappings = (name for name in dir(auto) if name.endswith("_MAPPING_NAMES"))
    tasks = " ".join(name for name in mappings if model_type in getattr(auto, name))
    if re.search("TEXT_TO_(WAVEFORM|SPECTROGRAM)|AUDIO|SPEECH|CTC", tasks) and "image" not in sees:
        return [], "audio"
    if "DETECTION" in tasks and not re.search("IMAGE_CLASSIFICATION|BACKBONE", tasks):
        return [], "detection"
    if reads not in ("input_ids", "pixel_values") or sees == {"video"}:
        return [], f"reads {reads}"
    if reads == "pixel_values" or model_type.endswith(("_vision", "_vision_model")):
        return ["image"], ""
    return [kind for kind in ("text", "image") if kind in sees], " ".join(sees)


def trial(kind: str, model_type: str, work: Path) -> str:
    """Make, train, read again; the outcome."""
    folder, kept, evaluate = work / kind / model_type, {}, common.Run.evaluate

    def keeping(run: Any, stage: int, step: int, num: int, student: Any, test: Any, *rest: Any):
        kept.update(student=student, views=test, run=run.folder)
        return evaluate(run, stage, step, num, student, test, *rest)

    common.Run.evaluate = keeping
    try:
        make_model(kind, model_type, folder)
    except Exception as error:  # noqa: BLE001 - whatever keeps a tiny model from being made
        return f"not made: {type(error).__name__}: {error}"
    args = adamatch.Args(
        dataset=str(work / ("texts.csv" if kind == "text" else "pictures")), backbone=str(folder),
        size=SIDE if kind == "image" else None, num_steps=2, batch_size=4, uratio=1, device="cpu",
        data_dir=str(work), runs_dir=str(folder / "runs"),
    )  # fmt: skip
    try:
        adamatch.main(args)
    except common.UserError as error:
        return f"refused: {error}"
    saved = kept["run"] / "student"
    try:
        student, _ = common.load_student(saved)
    except common.UserError as error:
        return f"trained, but the student cannot be read again: {error}"
    wrong = unreliable(kept["student"].eval(), student, kept["views"])
    if (saved / "encoder" / "tokenizer_config.json").exists():
        texts = [" ".join(WORDS[:20]), "unknown " + " ".join(WORDS[20:])]
        read = [t.AutoTokenizer.from_pretrained(at) for at in (folder, saved / "encoder")]
        one, other = (tokenizer(texts)["input_ids"] for tokenizer in read)
        wrong += ["the tokenizer read again differs"] if one != other else []
    return f"trained, but {'; '.join(wrong)}" if wrong else "trained"


@torch.no_grad()
def unreliable(trained: Any, student: Any, views: Any) -> list[str]:
    """What is wrong with the logits of a trained student and of the same one read again."""
    rows = torch.arange(len(views))
    whole, again, reread = (net(views.plain(rows))[0] for net in (trained, trained, student))
    alone = torch.cat([trained(views.plain(row))[0] for row in rows.split(1)])
    pairs = {
        "two predictions of one student differ": (again, 0),
        "the student read again differs": (reread, 0),
        "a row's logits depend on its batch": (alone, 1e-3),
    }
    largest = max(1, whole.abs().max())
    gaps = {what: (whole - other).abs().max() / largest for what, (other, _) in pairs.items()}
    wrong = [f"{what} by {gap:.1e}" for what, gap in gaps.items() if not gap <= pairs[what][1]]
    alike = len(views.plain(rows).unique(dim=0)) < len(rows) / 2
    wrong += ["most examples are alike to the model"] if alike else []
    return wrong + (["all rows have the same logits"] if (whole == whole[0]).all() else [])


def worker(pipe: Connection, kind: str, model_type: str, work: Path) -> None:
    """One trial in a process of its own, silent, with bounded memory."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        pipe.send(trial(kind, model_type, work))
    except BaseException as error:  # noqa: BLE001 - is what the sweep looks for
        ours = [at for at in traceback.extract_tb(error.__traceback__) if str(ROOT) in at.filename]
        pipe.send(f"TRACEBACK: {type(error).__name__} in {ours[-1].name}: {error}")


def outcome_of(kind: str, model_type: str, work: Path, timeout: float) -> str:
    """The outcome of one type, on one line, also if its process crashes or hangs."""
    context = multiprocessing.get_context("fork")  # everything is already imported
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=worker, args=(theirs, kind, model_type, work))
    process.start()
    theirs.close()
    try:
        said = ours.recv() if ours.poll(timeout) else f"TRACEBACK: no end within {timeout:g} s"
    except EOFError:
        process.join()
        said = f"TRACEBACK: crash, exit code {process.exitcode}"
    process.kill()
    process.join()
    shutil.rmtree(work / kind / model_type, ignore_errors=True)
    return " ".join(said.replace(f"{work}/{kind}/", "").split()).replace("|", "/")[:500]


def main(
    kind: Literal["text", "image", "all"] = "all", only: tuple[str, ...] = (),
    output: Path | None = None, timeout: float = 120,
) -> None:  # fmt: skip
    totals, skipped, file = Counter(), {}, open(output or os.devnull, "w")  # noqa: SIM115

    def say(line: str) -> None:
        print(line, flush=True)
        print(line, file=file, flush=True)

    t.logging.set_verbosity_error()
    say(f"transformers {t.__version__}, torch {torch.__version__}\n")
    say("type | kind | outcome | seconds\n--- | --- | --- | ---:")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make_data(work)
        for model_type in only or auto.MODEL_MAPPING_NAMES:
            kinds, why = kinds_of(model_type)
            if not kinds:
                skipped.setdefault(why, []).append(model_type)
            for each in (each for each in kinds if kind in (each, "all")):
                start = time.perf_counter()
                said = outcome_of(each, model_type, work, timeout)
                say(f"{model_type} | {each} | {said} | {time.perf_counter() - start:.1f}")
                totals[each, re.match("[a-zA-Z ]+(, but)?", said)[0]] += 1
    say("")
    for (each, outcome), number in sorted(totals.items()):
        say(f"{each} {outcome}: {number}")
    for why, names in skipped.items():
        say(f"skipped ({why}): {', '.join(names)}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
