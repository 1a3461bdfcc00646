"""Training in pieces is training in one: micro-batches, processes, shards of the model, checkpoints, kills."""
import json, os, random, shutil, signal, subprocess, sys, time
from collections import Counter
from dataclasses import replace
from pathlib import Path
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from safetensors.torch import load_file
from realign_nb.arms import last_checkpoint
from realign_nb.stages import keep_pairs
from scale_worker import RECIPES, adapter, launch_args, make_pairs, ready, train

pytestmark = [pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
              pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")]
torch.set_num_threads(1)
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(RECIPES/"cpu2.yaml"), "--main_process_port", "0"]
WORKER = Path(__file__).with_name("scale_worker.py")
HALF = dict(per_device_train_batch_size=4)                                     # of the 8 pairs that an optimiser step takes
SGD = dict(optim="sgd", lr_scheduler_type="constant", learning_rate=1e-2, projector_learning_rate=1e-2)
CASES = { # name -> settings of one process, and what two processes change
    "flat": (dict(layout="flat", reference="on_the_fly", projector="lora", **SGD), HALF),
    "shared": (dict(layout="shared", evaluate=11, per_device_eval_batch_size=1),
               dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, gradient_checkpointing=True)),
    "fsdp": (dict(layout="shared", save_strategy="steps", save_steps=1), dict(HALF, fsdp=True))}


def start(*words, **kw):
    return subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kw)


def finish(p):
    out = p.communicate(timeout=600)[0]
    assert p.returncode==0, out[-5000:]
    return out


def close(a, b, tolerance): return a.keys()==b.keys() and max((a[k]-b[k]).abs().max().item() for k in a)<tolerance


# ---- several processes

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "Every case in two processes under `accelerate launch`, the last one also from its checkpoint"
    out = tmp_path_factory.mktemp("two")
    cases = {k: {**one, **change} for k, (one, change) in CASES.items()}
    cases["resumed"] = dict(cases["fsdp"], resume=str(out/"fsdp"/"checkpoint-1"))
    (out/"job.json").write_text(json.dumps(dict(out=str(out), cases=cases)))
    finish(start(*LAUNCH, WORKER, out/"job.json"))
    return out


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(two, tmp_path, name):
    one, weights = train(tmp_path, **CASES[name][0])
    ranks = [json.loads((two/f"{name}.{i}.json").read_text()) for i in (0, 1)]
    both = ranks[0]
    assert (one["ranks"], both["ranks"], both["layout"])==(1, 2, CASES[name][0]["layout"])
    assert both["wrapped"]==("FSDPPeftModelForCausalLM" if name=="fsdp" else "DistributedDataParallel")
    assert all(Counter(x for r in ranks for b in r["seen"] for x in b)[p.id]>=1 for p in make_pairs())
    if not CASES[name][0].get("evaluate"):                                             # nobody sees what another one has seen
        assert Counter(x for r in ranks for b in r["seen"] for x in b)==Counter(x for b in one["seen"] for x in b)
    for a, b in zip(one["log"], both["log"], strict=True):
        assert a==pytest.approx(b, rel=2e-6, abs=2e-6)
    assert one["eval_loss"]==(both["eval_loss"] and pytest.approx(both["eval_loss"], rel=1e-6))
    moved = max((weights[k]-v).abs().max().item() for k, v in adapter(ready(tmp_path/"fresh", **CASES[name][0] and {k: v for k, v in CASES[name][0].items() if k in ("layout", "projector")})).items())
    assert moved>5e-4 and close(weights, load_file(two/f"{name}.safetensors"), 1e-6)


def test_fsdp_resumes_and_keeps_the_base_out_of_its_checkpoints(two):
    pass
