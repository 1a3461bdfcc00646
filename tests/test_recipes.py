"""Recipes: every one dry-run, the cost model against numbers from elsewhere, and one small training by a recipe."""
import json, os, subprocess, sys
from dataclasses import fields
from pathlib import Path
import pytest
import yaml
from realign_nb.arms import TrainSettings, score_arms, train_config
from realign_nb.cli import main_train
from realign_nb.compute import METHODS, SHAPES, Step, estimate, forward_flops, memory, step_flops
from realign_nb.core import read_jsonl
from realign_nb.dpo import streams
from realign_nb.hyperparameters import RECIPES, load_recipe, plan, recipe_names, recipe_settings, recipe_step, recipe_table
from realign_nb.stages import PairsSettings, make_pairs
from realign_nb.trainer import PROFILES

LLAVA, VICUNA = SHAPES["llava-hf/llava-1.5-7b-hf"], SHAPES["llava-hf/llava-v1.6-vicuna-7b-hf"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("recipes")/"run")
    make_pairs(folder, PairsSettings(n_images=6, k=3))
    return folder


# ---- every recipe

@pytest.mark.parametrize("name", recipe_names())
def test_dry_run(name, tmp_path):
    "Parsed, its configuration made, its objective asked for its streams, its model known, its launcher there"
    r = load_recipe(name); s = TrainSettings(**recipe_settings(r))
    c = train_config(s, r.arm, 0, tmp_path, r.pairs)
    assert (c.objective, c.rule, c.learning_rate) == (r.objective, PROFILES[r.profile]["rule"], PROFILES[r.profile]["learning_rate"])
    assert (c.per_device_train_batch_size, c.gradient_accumulation_steps, c.num_train_epochs, c.beta) == (1, 8, 1, .1)      # Table 6
    assert (c.lora_r, c.lora_alpha, c.gradient_checkpointing, c.layout, c.reference) == (128, 256, r.checkpointing, r.layout, r.reference)
    if any("@" in x for x in streams(c.objective, c.view)): assert c.view==r.view
    assert recipe_step(r).streams==streams(r.objective, r.view) and r.model in SHAPES
    launch = yaml.safe_load((RECIPES/"accelerate"/f"{r.launch}.yaml").read_text())
    assert launch["distributed_type"] == {"ddp": "MULTI_GPU", "zero2": "DEEPSPEED", "fsdp2": "FSDP"}[r.launch]
    lines = plan(r).splitlines()
    assert len(lines)==7 and r.model in lines[1] and f"{r.launch}.yaml" in lines[-1] and r.run in lines[0]
    assert f"{-(-r.pairs//32)} of 32 pairs" in lines[4]


def test_table_says_what_fits_and_what_was_run():
    t = recipe_table().set_index("recipe")
    assert list(t.index)==recipe_names() and t.fits.all() and (t["run"]=="not run").all()
    assert t.hours["llava-1.6-mistral-7b-16k"]/t.hours["llava-1.6-mistral-7b"] == pytest.approx(16/11, rel=.02)
    assert t.hours["llava-1.5-7b-dpo"]<t.hours["llava-1.5-7b"]<t.hours["llava-1.5-13b"]<t.hours["llava-1.6-vicuna-13b"]
    assert not recipe_table("A100", .2).equals(recipe_table())                                  # computed, not typed


def test_recipe_files_hold_no_costs():
    for n in recipe_names():
        assert not any(w in (RECIPES/f"{n}.toml").read_text().lower() for w in ("hours", "gib", "minutes", "tflop"))


# ---- the cost model against figures that were worked out by other means (the lengths: 100 tokens per response, 40 of text)

@pytest.mark.parametrize("shape, size, released, ratios", [
    (LLAVA, (336, 336), 95.7, dict(trl=1.28, shared=.68, shared_stored=.47)),
    (VICUNA, (672, 672), 431.7, dict(trl=1.28, shared=.64, shared_stored=.45))])
def test_ratios(shape, size, released, ratios):
    def total(**kw): return step_flops(shape, Step(size=size, **kw))["total"]/1e12
    base = total(**METHODS["released"])
    assert base == pytest.approx(released, rel=.03)
    for m, x in ratios.items(): assert total(**METHODS[m])/base == pytest.approx(x, abs=.012), m
    assert total(checkpointing=True)/base == pytest.approx(.69 if shape is LLAVA else .65, abs=.012)


def test_one_pair_by_hand():
    "LLaVA-1.5-7B, flat, the numbers written out"
    n, lora, T = 32*(4*4096**2+3*4096*11008), 32*128*(4*8192+3*(4096+11008)), 3*716
    f = forward_flops(LLAVA, Step(layout="flat"), True)
    assert (f["layers"], f["lora"], f["head"]) == (2*n*T, 2*lora*T, 2*32064*4096*300)
    assert f["attention"] == 3*4*4096*32*716**2/2
    g = step_flops(LLAVA, Step(layout="flat"))
    assert g["backward"] == pytest.approx(2*n*T + 4*lora*T + 2.5*f["attention"] + f["head"] + f["projector"]*(1+4096/5120))
    assert g["reference"]==g["recompute"]==0


def test_more_costs_more():
    a = estimate(LLAVA, Step())
    for worse in (dict(layout="flat"), dict(reference="on_the_fly"), dict(checkpointing=True), dict(response=200), dict(prompt=80)):
        assert estimate(LLAVA, Step(**worse))["train"]>a["train"], worse
    assert memory(LLAVA, Step(checkpointing=True))["total"]<memory(LLAVA, Step())["total"]<memory(LLAVA, Step(layout="flat"))["total"]
    assert memory(LLAVA, Step(), 4, "fsdp2")["total"]<memory(LLAVA, Step(), 4, "zero2")["total"]<memory(LLAVA, Step(), 4)["total"]
    assert estimate(LLAVA, Step(), gpus=8)["train"] == pytest.approx(a["train"]/2)
    assert step_flops(LLAVA, Step(size=(5, 5)))["total"]==step_flops(LLAVA, Step(size=(999, 9)))["total"]                  # 576 tokens, whatever the picture
    assert step_flops(VICUNA, Step(size=(336, 672)))["total"]<step_flops(VICUNA, Step(size=(672, 672)))["total"]


# ---- the command

def test_without_recipe_nothing_changes():
    "New settings are None unless asked for, so folders of before still match"
    new = {"accumulation", "layout", "reference", "checkpointing"}
    assert all(f.default is None for f in fields(TrainSettings) if f.name in new)
    c = train_config(TrainSettings(profile="paper"), "rdpo", 0, "unused")
    assert (c.layout, c.reference, c.gradient_accumulation_steps, c.reference_file) == ("auto", "stored", 8, None)


def test_options_win_over_the_recipe(run, capsys):
    assert main_train([run, "--recipe", "llava-1.5-7b-released", "--dry-run", "--any-model", "--beta", "0.2", "--accumulation", "2", "--profile", "paper"])==0
    out = capsys.readouterr().out
    for text in ("rule label, beta 0.2", "(1 x 2 x 4 GPUs)", "learning rate 1e-05", "llava-1.5-7b-released: "): assert text in out
    assert f"for {len(read_jsonl(run+'/pairs.jsonl'))} pairs" in out


@pytest.mark.parametrize("words, text", [
    (["--recipe", "llava-1.5-7b"], "is for llava-hf/llava-1.5-7b-hf, the model of"), (["--recipe", "nothing"], "recipe 'nothing' is unknown"),
    (["--dry-run"], "--dry-run needs --recipe NAME")])
def test_refusals(run, capsys, words, text):
    before = sorted(Path(run).rglob("*"))
    assert main_train([run, *words])==2 and text in capsys.readouterr().err and sorted(Path(run).rglob("*"))==before


def test_own_recipe_trains_and_scores_once(run, tmp_path, capsys):
    "A file of one's own, a run of the same model name: trained with its settings; then another arm finds its reference"
    own = tmp_path/"mine.toml"
    text = (RECIPES/"llava-1.5-7b-mdpo.toml").read_text().replace("accumulation = 8", "accumulation = 3").replace('layout = "auto"', 'layout = "flat"')
    own.write_text(text)
    assert main_train([run, "--recipe", str(own), "--any-model", "--workers", "1"])==0
    manifest = json.loads((Path(run)/"arms"/"mdpo-seed0"/"manifest.json").read_text())["settings"]
    assert (manifest["accumulation"], manifest["layout"], manifest["checkpointing"], manifest["profile"], manifest["arm"]) == (3, "flat", "off", "paper", "mdpo")
    done = json.loads((Path(run)/"arms"/"mdpo-seed0"/"done.json").read_text())
    assert done["steps"] == -(-done["pairs"]//3)
    kept = read_jsonl(Path(run)/"ref_logps-flat.jsonl")
    told = score_arms(run, ["dpo", "mdpo"], [0], TrainSettings(profile="paper", layout="flat"))
    assert list(told)==[("dpo", 0)] and told["dpo", 0]["scored"]==0 and told["dpo", 0]["reused"]>0
    assert read_jsonl(Path(run)/"ref_logps-flat.jsonl")==kept


def test_light_import():
    code = "import sys, realign_nb.hyperparameters as h; h.load_recipe('llava-1.5-7b'); print(*({'torch', 'transformers', 'trl', 'pandas'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert out.returncode==0 and out.stdout.strip()=="", out.stdout+out.stderr
