"""Training in pieces is training in one: micro-batches, processes, shards of the model, checkpoints, kills."""
import json, os, random, shutil, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import psutil
import pytest
import torch
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from realign_nb.arms import last_checkpoint
from realign_nb.stages import keep_pairs
from scale_worker import RECIPES, adapter, launch_args, make_pairs, ready, train

pytestmark = [pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
              pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")]
torch.set_num_threads(1)
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", RECIPES/"cpu2.yaml", "--main_process_port", "0"]
WORKER = Path(__file__).with_name("scale_worker.py")
HALF = dict(per_device_train_batch_size=2)                      # of the 4 pairs that an optimiser step takes
SGD = dict(optim="sgd", lr_scheduler_type="constant", learning_rate=1e-2, projector_learning_rate=1e-2)
CASES = { # name -> settings of one process, and what two processes change
    "flat": (dict(layout="flat", reference="on_the_fly", projector="lora", **SGD), HALF),
    "shared": (dict(layout="shared", evaluate=7, per_device_eval_batch_size=1, **SGD),
               dict(per_device_train_batch_size=1, gradient_accumulation_steps=2, gradient_checkpointing=True)),
    "fsdp": (dict(layout="shared", save_strategy="steps", save_steps=1), dict(HALF, fsdp=True)),
    "fsdp_bf16": (dict(layout="shared", dtype="bfloat16", bf16=True), dict(HALF, fsdp=True))}


def start(*words):
    env = os.environ | dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    return subprocess.Popen([*map(str, words)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill(p):
    "SIGKILL to a process and all that it has started; the launcher gives its workers sessions of their own"
    for q in [*psutil.Process(p.pid).children(recursive=True), p]: q.kill()
    return p.communicate()[0]


def finish(p, limit=300, status=0):
    try: out = p.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired: pytest.fail(f"not done after {limit} s; its last words: {kill(p)[-3000:]}")
    assert p.returncode==status, out[-5000:]


def apart(a, b):
    "Largest difference between two dicts of tensors"
    assert a.keys()==b.keys() and a
    return max((a[k]-b[k]).abs().max().item() for k in a)


# ---- several processes

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "All cases in two gloo processes under `accelerate launch`, and one again from its checkpoint"
    out = tmp_path_factory.mktemp("two")
    cases = {k: {**one, **change} for k, (one, change) in CASES.items()}
    cases["resumed"] = dict(cases["fsdp"], resume=str(out/"fsdp"/"checkpoint-1"))
    (out/"job.json").write_text(json.dumps(dict(out=str(out), cases=cases)))
    finish(start(*LAUNCH, WORKER, out/"job.json"))
    return out


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(two, tmp_path, name):
    one, weights = train(tmp_path, **CASES[name][0])
    a, b = (json.loads((two/f"{name}.{i}.json").read_text()) for i in (0, 1))
    assert (one["ranks"], a["ranks"], a["layout"])==(1, 2, CASES[name][0]["layout"])
    assert a["wrapped"]==("FSDPPeftModelForCausalLM" if "fsdp" in name else "DistributedDataParallel")
    assert [i for both in zip(a["seen"], b["seen"]) for ids in both for i in ids]==[i for ids in one["seen"] for i in ids]
    near = 2e-2 if "bf16" in name else 2e-6                     # another batch, another rounding
    for x, y in zip(one["log"], a["log"], strict=True): assert x==pytest.approx(y, rel=near, abs=near)
    near = 1e-5 if name=="fsdp" else 1e-6                       # AdamW divides gradients that are rounding errors by themselves
    if name!="fsdp_bf16": assert apart(weights, load_file(two/f"{name}.safetensors"))<near and one["moved"]>5e-4
    assert a.get("eval_loss")==(one.get("eval_loss") and pytest.approx(one["eval_loss"], rel=1e-6))


def test_fsdp_checkpoints_hold_the_adapter_only_and_resume(two):
    folder = two/"fsdp"/"checkpoint-1"
    saved, trained = load_file(two/"fsdp"/"checkpoint-2"/"adapter_model.safetensors"), load_file(two/"fsdp.safetensors")
    assert apart({k.replace(".default", "").replace(".modules_to_save", ""): v for k, v in trained.items()}, saved)==0.
    sharded = torch.load(folder/"pytorch_model_fsdp.bin", weights_only=True)
    assert {k for k in sharded if "lm_head" not in k}==trained.keys()                   # the tiny model's head is tied to its embeddings
    assert apart(trained, load_file(two/"resumed.safetensors"))==0.
    logs = [json.loads((two/f"{n}.0.json").read_text())["log"] for n in ("fsdp", "resumed")]
    assert logs[0]==logs[1]
    parts = [p.name for p in (two/"fsdp").glob("ref_logps*")]
    assert sorted(parts)==["ref_logps-1of2.jsonl", "ref_logps-2of2.jsonl"]              # scored once, a part by each process


@pytest.mark.parametrize("layout", ["flat", "shared"])
def test_checkpointing_computes_twice_and_changes_nothing(tmp_path, layout):
    weights, calls = [], []
    for on in (False, True):
        t = ready(tmp_path/str(on), layout=layout, max_steps=1, gradient_checkpointing=on, **SGD)
        layer, count = t.model.get_base_model().model.language_model.layers[0], []
        layer.self_attn.register_forward_hook(lambda *a: count.append(1))
        t.train(); weights.append(adapter(t)); calls.append(len(count))
    assert calls==[1, 2] and apart(*weights)<1e-7


def test_recipes_say_what_they_are_for():
    "accelerate reads them; what they do on GPUs, and DeepSpeed altogether, is not run here"
    kinds = {n: launch_args(n, *([] if n=="cpu2" else ["--num_processes", "4"])) for n in sorted(f.stem for f in RECIPES.glob("*.yaml"))}
    assert {n: (a.multi_gpu, a.use_fsdp, a.use_deepspeed, a.num_processes) for n, a in kinds.items()}==dict(
        cpu2=(True, False, False, 2), ddp=(True, False, False, 4), fsdp2=(False, True, False, 4), zero2=(False, False, True, 4))
    assert all(a.mixed_precision=="no" for a in kinds.values())                         # left to the trainer's bf16
    fsdp = prepare_multi_gpu_env(kinds["fsdp2"])
    assert (fsdp["FSDP_VERSION"], fsdp["FSDP_STATE_DICT_TYPE"], fsdp["FSDP_TRANSFORMER_CLS_TO_WRAP"])==("2", "FULL_STATE_DICT", "LlamaDecoderLayer")
    kinds["zero2"].deepspeed_fields_from_accelerate_config = ""
    env = prepare_deepspeed_cmd_env(kinds["zero2"])[1]
    assert {k: env[f"ACCELERATE_{k}"] for k in ("DEEPSPEED_ZERO_STAGE", "GRADIENT_ACCUMULATION_STEPS", "GRADIENT_CLIPPING")}==dict(
        DEEPSPEED_ZERO_STAGE="2", GRADIENT_ACCUMULATION_STEPS="auto", GRADIENT_CLIPPING="auto")
    with pytest.raises(ValueError, match="num_processes"): launch_args("ddp")


# ---- checkpoints and kills

LONG = dict(layout="shared", max_steps=8, save_strategy="steps", save_steps=2, **HALF)    # two epochs of four steps, a cosine


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, *train(folder, **LONG)


def test_checkpoint_holds_the_adapter_only(unbroken):
    folder, _, weights = unbroken
    files = {f.name: f.stat().st_size for f in (folder/"checkpoint-8").iterdir()}
    trained = sum(v.numel()*4 for v in weights.values())
    model = {k.replace(".default", "").replace(".modules_to_save", "") for k in weights}
    assert load_file(folder/"checkpoint-8"/"adapter_model.safetensors").keys()==model
    assert files.pop("adapter_model.safetensors")<1.2*trained and 2*trained<=files.pop("optimizer.pt")<2.4*trained
    assert sum(files.values())<80_000                                                   # settings, tokenizer, states


def test_killed_run_goes_on_as_if_nothing_had_been(unbroken, tmp_path):
    whole, told, weights = unbroken
    step = random.SystemRandom().randint(3, 8)
    (tmp_path/"job.json").write_text(json.dumps(dict(out=str(tmp_path), cases=dict(killed=dict(LONG, kill=step)))))
    finish(start(sys.executable, WORKER, tmp_path/"job.json"), status=-signal.SIGKILL)
    found = last_checkpoint(tmp_path/"killed")
    assert Path(found).name==f"checkpoint-{(step-1)//2*2}", f"killed at step {step}"
    again, resumed = train(tmp_path/"killed", resume=found, **LONG)
    assert again["log"]==told["log"] and again["seen"]==told["seen"][(step-1)//2*2:] and apart(weights, resumed)==0., f"killed at step {step}"
    for name in ("optimizer.pt", "scheduler.pt"):
        a, b = (torch.load(f/"checkpoint-8"/name, weights_only=True) for f in (whole, tmp_path/"killed"))
        assert a.keys()==b.keys() and a.get("param_groups", a)==b.get("param_groups", b)
        for i, moments in a.get("state", {}).items(): assert apart(moments, b["state"][i])==0.


def test_torn_checkpoint_is_skipped(unbroken, tmp_path):
    for n in (4, 6, 8): shutil.copytree(unbroken[0]/f"checkpoint-{n}", tmp_path/f"checkpoint-{n}")
    assert Path(last_checkpoint(tmp_path)).name=="checkpoint-8"
    state = tmp_path/"checkpoint-8"/"trainer_state.json"
    state.write_bytes(state.read_bytes()[:-20])                                         # cut while it was written
    (tmp_path/"checkpoint-6"/"trainer_state.json").unlink()                             # not written yet
    (tmp_path/"checkpoint-10").mkdir()
    assert Path(last_checkpoint(tmp_path)).name=="checkpoint-4"
    shutil.rmtree(tmp_path/"checkpoint-4"); assert last_checkpoint(tmp_path) is None


@pytest.mark.slow
def test_realign_train_in_two_processes_survives_a_kill(tmp_path):
    "The command under `accelerate launch`: same steps and adapter as alone, also after SIGKILL to all of its processes"
    script, images, pairs = tmp_path/"train.py", tmp_path/"images", []
    script.write_text("import sys\nfrom realign_nb.cli import main_train\nif __name__=='__main__': sys.exit(main_train())\n")
    images.mkdir()
    for p in make_pairs(32):
        for side, picture in (("v", p.image), ("r", p.retrieved_image)): picture.save(images/f"{p.id}{side}.png")
        pairs.append(replace(p, image=f"{p.id}v.png", retrieved_image=f"{p.id}r.png"))
    for name in ("one", "two"): keep_pairs(tmp_path/name, pairs, images, "tiny", "made for a test")
    words = ["--arms", "rdpo", "--epochs", "20"]                                        # 80 steps, a checkpoint after 50
    finish(start(sys.executable, script, tmp_path/"one", *words, "--workers", "1"))
    arm = Path("arms")/"rdpo-seed0"
    p = start(*LAUNCH, script, tmp_path/"two", *words)
    while not last_checkpoint(tmp_path/"two"/arm/"checkpoints"):
        assert p.poll() is None, p.communicate()[0][-5000:]
        time.sleep(.05)
    time.sleep(random.SystemRandom().random())
    kill(p)
    assert not (tmp_path/"two"/arm/"done.json").exists()
    finish(start(*LAUNCH, script, tmp_path/"two", *words))
    done = [json.loads((tmp_path/n/arm/"done.json").read_text()) for n in ("one", "two")]
    assert [d["steps"] for d in done]==[80, 80] and [f.name for f in (tmp_path/"two"/"arms").iterdir()]==["rdpo-seed0"]
    a, b = (load_file(tmp_path/n/arm/"adapter"/"adapter_model.safetensors") for n in ("one", "two"))
    assert apart(a, b)<1e-5 and max(v.abs().max().item() for k, v in a.items() if "lora_B" in k)>1e-3
    logs = [[json.loads(l) for l in (tmp_path/n/arm/"log.jsonl").read_text().splitlines()] for n in ("one", "two")]
    assert [x["step"] for x in logs[0]]==[x["step"] for x in logs[1]] and logs[0][-1]["loss"]==pytest.approx(logs[1][-1]["loss"], rel=1e-4)
