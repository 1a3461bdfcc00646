"""Trains the tiny model for a few steps and writes what came out: in one process, or in several under `accelerate launch`.

    python tests/scale_worker.py JOB.json      {"out": folder, "cases": {name: settings of `train`}}
"""
import json, os, signal, sys, warnings
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
import numpy as np
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import save_file
from transformers import PrinterCallback, TrainerCallback, set_seed
import realign_nb
from realign_nb.core import PreferencePair
from realign_nb.tinyvlm import build
from realign_nb.trainer import RDPOConfig, make_trainer
from realign_nb.world import DESCRIBE, caption, draw, make_scenes, question

RECIPES, built = Path(realign_nb.__file__).parent/"recipes"/"accelerate", lru_cache(build)


def make_pairs(n=8):
    "Captions and yes/no questions in turn, so that every batch is ragged"
    rng, scenes = np.random.default_rng(0), make_scenes(n, "train", seed=5)
    pictures, texts = [draw(s) for s in scenes], [caption(s, rng) for s in scenes]
    words = [(DESCRIBE, texts[i], texts[i-1]) if i%3 else (question("teddy bear"), "Yes.", "No, there is not.") for i in range(n)]
    return [PreferencePair(f"p{i:02d}", x, pictures[i], pictures[i-1], w, l, "[MASK]") for i, (x, w, l) in enumerate(words)]


class Watched:
    "A collator, and the ids that it was asked for"
    def __init__(self, collator): self.collator, self.seen = collator, []
    def __call__(self, examples):
        rows = self.collator(examples); self.seen.append(rows["ids"]); return rows


class Killed(TrainerCallback):
    "SIGKILL to the own process: no handler, no flush, no clean-up"
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, **kw):
        if state.global_step==self.step: os.kill(os.getpid(), signal.SIGKILL)


def launch_args(name, *more):
    "What `accelerate launch` makes of a recipe and the command line"
    return _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(RECIPES/f"{name}.yaml"), *more, "script.py"]))[0]


def shard_on_cpu():
    "FSDP2 as fsdp2.yaml sets it. accelerate leaves it off without an accelerator, so it is told that it has some; all else is real"
    os.environ.update({k: v for k, v in prepare_multi_gpu_env(launch_args("fsdp2", "--num_processes", "2")).items() if "FSDP" in k})
    AcceleratorState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def ready(folder, pairs=8, noise=.1, kill=None, dtype="float32", fsdp=False, **kw):
    "A trainer on a fresh base; `noise` replaces the zeros of LoRA B and moves the projector's copy"
    pairs, (model, processor) = make_pairs(pairs), deepcopy(built(seed=0))
    config = {**dict(projector="full", lora_r=4, lora_alpha=8, learning_rate=1e-3, projector_learning_rate=1e-3, warmup_steps=0, logging_steps=1,
                     per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=2, save_strategy="no", disable_tqdm=True), **kw}
    config = RDPOConfig(output_dir=str(folder), use_cpu=True, **config)
    if fsdp: shard_on_cpu()
    set_seed(0)
    t = make_trainer(model.to(getattr(torch, dtype)), processor, pairs, config, callbacks=[Killed(kill)] if kill else None)
    t.remove_callback(PrinterCallback)
    t.data_collator, gen = Watched(t.data_collator), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, p in t.model.named_parameters():
            if noise and p.requires_grad and "lora_A" not in n: p.add_(noise*torch.randn(p.shape, generator=gen))
    return t


def adapter(t):
    "Name -> whole tensor of the trained weights; under FSDP all processes have to call it"
    whole = lambda p: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone().contiguous()
    return {n: whole(p) for n, p in t.model.named_parameters() if "lora_" in n or ".modules_to_save." in n}


def train(folder, resume=None, evaluate=0, **kw):
    "One training: (what it told, the adapter)"
    t = ready(folder, **kw)
    before = adapter(t)
    t.train(resume_from_checkpoint=resume)
    after, names = adapter(t), ("loss", "grad_norm", "rewards/margins", "learning_rate")
    told = dict(log=[{k: x[k] for k in names} for x in t.state.log_history if "loss" in x], seen=t.data_collator.seen[:],
                moved=max((after[k]-v).abs().max().item() for k, v in before.items()), ranks=t.accelerator.num_processes,
                layout=t.args.layout, wrapped=type(t.model_wrapped).__name__)
    if evaluate: told["eval_loss"] = t.evaluate(t.train_dataset.select(range(evaluate)))["eval_loss"]
    return told, after


if __name__=="__main__":
    torch.set_num_threads(1); warnings.filterwarnings("ignore")
    job = json.loads(Path(sys.argv[1]).read_text())
    for name, case in job["cases"].items():
        told, weights = train(Path(job["out"])/name, **case)
        (Path(job["out"])/f"{name}.{PartialState().process_index}.json").write_text(json.dumps(told))
        if PartialState().is_main_process: save_file(weights, Path(job["out"])/f"{name}.safetensors")
