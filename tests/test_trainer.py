"""Training against independent ways of computing the same numbers: TRL with doubled pairs, transformers' own loss, plain loops."""
import inspect, math, subprocess, sys
from copy import deepcopy
from dataclasses import fields
import numpy as np
import pytest
import torch
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from realign_nb.core import PreferencePair
from realign_nb.dpo import OBJECTIVES, STREAMS
from realign_nb.models import chat_text
from realign_nb.rdpo import VIEWS
from realign_nb.rows import branch_logps, flat_rows, needed_lengths
from realign_nb.tinyvlm import build
from realign_nb.adapters import group_table, lora_config
from realign_nb.trainer import (PROFILES, PairCollator, RDPOConfig, RDPOTrainer, make_trainer, pair_dataset,
                                save_adapter)
from realign_nb.world import DESCRIBE, caption, draw, make_scenes, question

pytestmark = [pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
              pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")]
torch.set_num_threads(1)                 # the model is tiny: more threads only wait for each other
BASE, PROCESSOR = build(seed=0)
INDEX = [dict(index=i) for i in range(6)]


def make_pairs(n=16):
    "Captions and yes/no questions in turn, so that every batch is ragged"
    rng, scenes = np.random.default_rng(0), make_scenes(n, "train", seed=5)
    pictures, texts = [draw(s) for s in scenes], [caption(s, rng) for s in scenes]
    words = [(DESCRIBE, texts[i], texts[i-1]) if i%3 else (question("teddy bear"), "Yes.", "No, there is not.") for i in range(n)]
    return [PreferencePair(f"p{i:02d}", x, pictures[i], pictures[i-1], w, l, "[MASK]") for i, (x, w, l) in enumerate(words)]


PAIRS = make_pairs()


def settings(tmp_path, **kw):
    kw = {**dict(projector="frozen", reference="on_the_fly", lora_r=4, lora_alpha=8, learning_rate=1e-3, projector_learning_rate=1e-3, logging_steps=1,
                 per_device_train_batch_size=6, gradient_accumulation_steps=1, save_strategy="no", disable_tqdm=True), **kw}
    return RDPOConfig(output_dir=str(tmp_path), use_cpu=True, **kw)


def ready(tmp_path, pairs=PAIRS, noise=0., **kw):
    "A trainer on a fresh copy of the base; `noise` replaces the zeros of LoRA B and moves the projector's copy"
    t = make_trainer(deepcopy(BASE), PROCESSOR, pairs, settings(tmp_path, **kw))
    t.remove_callback(PrinterCallback)
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, p in t.model.named_parameters():
            if noise and p.requires_grad and "lora_A" not in n: p.add_(noise*torch.randn(p.shape, generator=gen))
    return t


def loss_of(t, examples=INDEX, pairs=PAIRS):
    return t.compute_loss(t.model, PairCollator(pairs, PROCESSOR, t.args)(examples))


def gradients(t, loss):
    t.model.zero_grad(); loss.backward()
    return {n: p.grad.clone() for n, p in t.model.named_parameters() if p.grad is not None}


def distance(a, b):
    "Relative L2 distance of two dicts of tensors"
    assert a.keys()==b.keys() and a
    return (sum((a[k]-b[k]).pow(2).sum() for k in a)/sum(b[k].pow(2).sum() for k in b)).sqrt().item()


def adapter(t): return {n: p.detach().clone() for n, p in t.model.named_parameters() if p.requires_grad}


# ---- the oracle: TRL's own trainer and loss on doubled pairs [w|v ; w|v] against [l|v ; w|v_l], with loss_weights=[2.0]

def trl_doubled(pairs):
    "A collator for TRL's DPOTrainer: its vision collator twice, with v and with v_l, and the rows put together"
    collate, tok = DataCollatorForVisionPreference(PROCESSOR), PROCESSOR.tokenizer
    def rows(ps, field):
        return collate([dict(images=[getattr(p, field)], prompt=tok.bos_token+chat_text(PROCESSOR, p.prompt),
                             chosen=p.chosen+tok.eos_token, rejected=p.rejected+tok.eos_token) for p in ps])
    def call(examples):
        ps = [pairs[e["index"]] for e in examples]
        a, b, n = rows(ps, "image"), rows(ps, "retrieved_image"), len(ps)
        return {k: torch.cat([a[k][:n], a[k][:n], a[k][n:], b[k][:n]])
                for k in ("input_ids", "attention_mask", "completion_mask", "pixel_values")}
    return call


def trl_trainer(tmp_path, like):
    "TRL's trainer with the weights of ours"
    config = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, loss_weights=[2.0],
                       remove_unused_columns=False, max_length=None, dataloader_pin_memory=False, report_to="none", disable_tqdm=True)
    base, a = deepcopy(BASE), like.args
    t = DPOTrainer(model=base, args=config, train_dataset=pair_dataset(PAIRS), processing_class=PROCESSOR,
                   data_collator=trl_doubled(PAIRS), peft_config=lora_config(base, a.lora_r, a.lora_alpha, a.projector, a.lora_targets))
    t.model.load_state_dict(like.model.state_dict())
    return t


def test_equals_trl_with_doubled_pairs(tmp_path):
    ours = ready(tmp_path, noise=.1, projector="full", max_steps=20)
    theirs = trl_trainer(tmp_path, ours)
    batch = theirs.data_collator(INDEX)
    assert len(set(batch["attention_mask"].sum(1).tolist()))>4                             # ragged
    a, b = loss_of(ours), theirs.compute_loss(theirs.model, batch)
    assert abs(a.item()-2*math.log(2))>.02 and a.item()==pytest.approx(b.item(), rel=2e-5)
    assert distance(gradients(ours, a), gradients(theirs, b))<1e-4
    for name in ("rewards/chosen", "logps/chosen"):                                        # the chosen side is the same in both halves
        assert ours._metrics["train"][name][-1]==pytest.approx(theirs._metrics["train"][name][-1], rel=1e-4, abs=1e-5)
    ours.train()
    theirs.model.load_state_dict(ours.model.state_dict())
    c, d = loss_of(ours), theirs.compute_loss(theirs.model, batch)
    assert ours.state.global_step==20 and c.item()<.9*a.item() and c.item()==pytest.approx(d.item(), rel=2e-5)


def test_plain_dpo_equals_trl(tmp_path):
    ours = ready(tmp_path, noise=.1, objective="dpo")
    theirs = trl_trainer(tmp_path, ours)
    rows = theirs.data_collator(INDEX); rows = {k: torch.cat([v[:6], v[12:18]]) for k, v in rows.items()}      # [w|v] against [l|v]
    assert loss_of(ours).item()==pytest.approx(theirs.compute_loss(theirs.model, rows).item()/2, rel=2e-5)     # its loss weight is 2
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"):
        assert ours._metrics["train"][name][-1]==pytest.approx(theirs._metrics["train"][name][-1], rel=1e-4, abs=1e-5), name


def test_sft_equals_the_models_own_loss(tmp_path):
    t, calls = ready(tmp_path, noise=.1, objective="sft"), []
    t.model.register_forward_hook(lambda *a: calls.append(1))
    ours = [loss_of(t, [e]).item() for e in INDEX]
    assert len(calls)==6                                                                   # no pass through a reference
    for p, value in zip(PAIRS, ours):
        x = PROCESSOR(text=chat_text(PROCESSOR, p.prompt, p.chosen), images=p.image, return_tensors="pt")
        start = len(PROCESSOR(text=chat_text(PROCESSOR, p.prompt), images=p.image, return_tensors="pt")["input_ids"][0])
        labels = x["input_ids"].clone(); labels[:, :start] = -100
        assert t.model(**x, labels=labels).loss.item()==pytest.approx(value, rel=1e-5)
    assert loss_of(t).item()==pytest.approx(sum(ours)/6, rel=1e-5)


# ---- what must not matter

@pytest.mark.parametrize("projector", ["frozen", "lora", "full"])
def test_fresh_adapter_starts_at_two_ln_two(tmp_path, projector):
    t = ready(tmp_path, projector=projector)
    assert loss_of(t).item()==pytest.approx(2*math.log(2), abs=1e-5)
    rewards = {k: v for k, v in t._metrics["train"].items() if k.startswith("rewards/")}
    assert len(rewards)==8 and all(v==[0.] for v in rewards.values())


def test_batch_size_padding_and_order_change_nothing(tmp_path):
    t = ready(tmp_path, noise=.1, projector="full")
    whole, alone = loss_of(t), [loss_of(t, [e]) for e in INDEX]
    assert whole.item()==pytest.approx(torch.stack(alone).mean().item(), rel=1e-5)
    assert loss_of(t, INDEX[::-1]).item()==pytest.approx(whole.item(), rel=1e-5)
    assert distance(gradients(t, whole), gradients(t, torch.stack(alone).mean()))<1e-4


def test_same_image_gives_no_visual_gradient(tmp_path):
    same = [PreferencePair(p.id, p.prompt, p.image, p.image, p.chosen, p.rejected, p.masked) for p in PAIRS]
    t = ready(tmp_path, noise=.1, objective="vdpo")
    reference = gradients(t, loss_of(t))                                                   # with the retrieved images
    nothing = loss_of(t, pairs=same)
    assert nothing.item()==pytest.approx(math.log(2), abs=1e-6)
    norm = lambda g: sum(v.pow(2).sum() for v in g.values()).sqrt().item()
    assert norm(gradients(t, nothing))<1e-5*norm(reference)
    both, text = (ready(tmp_path, noise=.1, objective=o) for o in ("rdpo", "dpo"))
    assert distance(gradients(both, loss_of(both, pairs=same)), gradients(text, loss_of(text, pairs=same)))<1e-5


def test_accumulation_equals_one_batch(tmp_path):
    def step(batch, accumulation):
        t = ready(tmp_path, PAIRS[:8], noise=.1, projector="full", optim="sgd", lr_scheduler_type="constant", warmup_steps=0,
                  learning_rate=.01, projector_learning_rate=.01, per_device_train_batch_size=batch,
                  gradient_accumulation_steps=accumulation, max_steps=1)
        before = adapter(t); t.train()
        return {k: v-before[k] for k, v in adapter(t).items()}, t.state.log_history[0]
    (a, log_a), (b, log_b) = step(1, 8), step(8, 1)
    assert distance(a, b)<1e-3                                                             # float32 differences of weights
    assert log_a["loss"]==pytest.approx(log_b["loss"], rel=1e-4) and log_a["grad_norm"]==pytest.approx(log_b["grad_norm"], rel=1e-4)


def test_any_resolution_images(tmp_path):
    "LLaVA-NeXT: the number of image tokens depends on the size of the picture, and the two images of a pair may differ"
    from transformers import (CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration,
                              LlavaNextImageProcessorPil, LlavaNextProcessor)
    tok, pins = PROCESSOR.tokenizer, [[28, 56], [56, 28], [56, 56]]
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = LlavaNextConfig(vision_config=CLIPVisionConfig(**size, image_size=28, patch_size=14), image_token_index=tok.image_token_id,
                             text_config=LlamaConfig(**size, vocab_size=len(tok), pad_token_id=0, max_position_embeddings=256),
                             image_grid_pinpoints=pins, vision_feature_layer=-2, vision_feature_select_strategy="default")
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config).eval()
    resize = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=pins)
    processor = LlavaNextProcessor(resize, tok, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
                                   chat_template=PROCESSOR.chat_template)
    sizes = [(96, 96), (96, 40), (30, 96), (64, 50)]
    pairs = [PreferencePair(p.id, p.prompt, p.image.resize(s), p.retrieved_image.resize(r), p.chosen, p.rejected, p.masked)
             for p, s, r in zip(PAIRS, sizes, sizes[1:]+sizes[:1])]
    rows, needed = flat_rows(pairs, processor), needed_lengths(pairs, processor)
    assert len({(i==tok.image_token_id).sum().item() for i in rows["input_ids"]})>1
    longest = rows["attention_mask"].sum(1).view(3, 4).max(0).values.tolist()
    assert all(n>=l for n, l in zip(needed.values(), longest)) and max(needed.values())>=rows["input_ids"].shape[1]
    with torch.no_grad(): whole, alone = branch_logps(model, rows), [branch_logps(model, flat_rows([p], processor)) for p in pairs]
    for s in whole: assert whole[s].tolist()==pytest.approx([a[s].item() for a in alone], rel=1e-5)
    t = make_trainer(model, processor, pairs, settings(tmp_path, projector="lora", max_steps=1))
    t.remove_callback(PrinterCallback); t.train()
    assert t.state.log_history[0]["loss"]==pytest.approx(2*math.log(2), abs=1e-5)


# ---- what changes and what stays

@pytest.mark.parametrize("projector", ["frozen", "lora", "full"])
def test_a_step_changes_the_adapter_and_nothing_else(tmp_path, projector):
    t = ready(tmp_path, projector=projector, max_steps=2, warmup_steps=0)
    rows = flat_rows(PAIRS[:4], PROCESSOR)
    def reference():
        with torch.no_grad(), t.model.disable_adapter(): return branch_logps(t.model, rows)
    before, ref = {k: v.clone() for k, v in t.model.state_dict().items()}, reference()
    t.train()
    changed = {k for k, v in t.model.state_dict().items() if not torch.equal(v, before[k])}
    assert all("lora_" in k or (projector=="full" and "modules_to_save" in k) for k in changed)
    assert not any("vision_tower" in k for k in changed)
    assert {k for k in before if "language_model" in k and "lora_B" in k}<=changed
    assert bool([k for k in changed if "multi_modal_projector" in k])==(projector!="frozen")
    after = reference()
    assert all(torch.equal(ref[s], after[s]) for s in ref)                                 # bit by bit
    with torch.no_grad(): assert (branch_logps(t.model, rows)["w"]-ref["w"]).abs().min()>0


def test_groups_have_their_own_learning_rate(tmp_path):
    t = ready(tmp_path, projector="full", learning_rate=1e-4, projector_learning_rate=3e-4, max_steps=4, warmup_steps=0)
    assert [(r["name"], r["learning_rate"]) for r in group_table(t)]==[("language model", 1e-4), ("projector", 3e-4)]
    seen = []
    t.optimizer.register_step_pre_hook(lambda o, *a: seen.append([g["lr"] for g in o.param_groups]))
    t.train()
    assert seen[0]==pytest.approx([1e-4, 3e-4]) and seen[3][0]<.3*seen[0][0]
    assert all(b==pytest.approx(3*a) for a, b in seen)                                     # the cosine scales both
    assert {id(p) for g in t.optimizer.param_groups for p in g["params"]}=={id(p) for p in t.model.parameters() if p.requires_grad}


class Watched(PairCollator):
    def __init__(self, *a): super().__init__(*a); self.seen = []
    def __call__(self, examples):
        out = super().__call__(examples); self.seen.append(tuple(out["ids"])); return out


def watched(tmp_path, **kw):
    t = ready(tmp_path, per_device_train_batch_size=4, **kw)
    t.data_collator = Watched(PAIRS, PROCESSOR, t.args)
    return t


def test_resume_gives_the_same_adapter(tmp_path):
    kw = dict(num_train_epochs=2, save_strategy="steps", save_steps=3, projector="full")
    whole = watched(tmp_path/"a", **kw); whole.train()
    rest = watched(tmp_path/"b", **kw); rest.train(resume_from_checkpoint=str(tmp_path/"a"/"checkpoint-3"))
    assert rest.state.global_step==whole.state.global_step==8
    assert [l["step"] for l in rest.state.log_history]==[l["step"] for l in whole.state.log_history]
    assert rest.data_collator.seen[-5:]==whole.data_collator.seen[-5:]
    a, b = adapter(whole), adapter(rest)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_seed_fixes_the_order_and_the_result(tmp_path):
    runs = [watched(tmp_path, seed=s, max_steps=4) for s in (0, 0, 1)]
    for t in runs: t.train()
    same, again, other = (t.data_collator.seen for t in runs)
    assert same==again!=other and sorted(i for b in same for i in b)==[p.id for p in PAIRS]
    assert all(torch.equal(a, b) for a, b in zip(adapter(runs[0]).values(), adapter(runs[1]).values()))


# ---- profiles, views, names

def test_released_profile_differs_from_paper(tmp_path):
    common = dict(lora_r=4, lora_alpha=8)
    paper, released = (ready(tmp_path, noise=.1, **{**common, **PROFILES[p]}) for p in ("paper", "released"))
    assert [r["name"] for r in group_table(paper)]==["language model", "projector"]
    assert [(r["name"], r["tensors"], r["learning_rate"]) for r in group_table(released)]==[("language model", 24, 1e-6)]
    relabelled = ready(tmp_path, noise=.1, **{**common, **PROFILES["released"], "rule": "label"})
    assert abs(loss_of(released).item()-loss_of(relabelled).item())>.01
    def logp(p, y, image, own):                                    # full logits, one conversation, a loop over tokens
        x = PROCESSOR(text=chat_text(PROCESSOR, p.prompt, y), images=image, return_tensors="pt")
        start = len(PROCESSOR(text=chat_text(PROCESSOR, p.prompt), images=image, return_tensors="pt")["input_ids"][0])
        lp, ids = released.model(**x).logits[0].log_softmax(-1), x["input_ids"][0]
        pick = lambda t: ids[t] if not own else next(k for k in lp[t-1].argsort(descending=True) if k!=ids[t])
        return sum(lp[t-1, pick(t)].item() for t in range(start, len(ids)))
    def three(p):
        rows = (p.chosen, p.image, False), (p.rejected, p.image, True), (p.chosen, p.retrieved_image, True)
        return np.array([logp(p, *r) for r in rows])
    with torch.no_grad():
        for p in PAIRS[:2]:
            policy = three(p)
            with released.model.disable_adapter(): h = policy-three(p)
            by_hand = sum(math.log1p(math.exp(-.1*(h[0]-h[k]))) for k in (1, 2))
            assert loss_of(released, [dict(index=PAIRS.index(p))]).item()==pytest.approx(by_hand, rel=1e-4)


def test_weights_scale_the_halves(tmp_path):
    both, text, image = (loss_of(ready(tmp_path, noise=.1, weights=w)).item() for w in ([1., 1.], [1., 0.], [0., 1.]))
    assert both==pytest.approx(text+image, rel=1e-5) and abs(text-image)>1e-3


def test_evaluation_logs_under_eval_names(tmp_path):
    t = ready(tmp_path, noise=.1)
    out = t.evaluate(pair_dataset(PAIRS))
    expected = np.mean([loss_of(t, [dict(index=i)]).item() for i in range(16)])
    assert out["eval_loss"]==pytest.approx(expected, rel=1e-3) and "eval_rewards/image_margins" in out


def test_saved_adapter_reloads(tmp_path):
    from peft import PeftModel
    from transformers import AutoProcessor
    t = ready(tmp_path, noise=.1, projector="full", max_steps=1); t.train()
    folder = save_adapter(t, tmp_path/"adapter")
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    model = PeftModel.from_pretrained(deepcopy(BASE), folder).eval()
    rows, again = flat_rows(PAIRS[:3], PROCESSOR), flat_rows(PAIRS[:3], processor)
    assert torch.equal(rows["input_ids"], again["input_ids"]) and torch.equal(rows["pixel_values"], again["pixel_values"])
    with torch.no_grad():
        on, trained, base = branch_logps(model, again), branch_logps(t.model.eval(), rows), branch_logps(BASE, rows)
        with model.disable_adapter(): off = branch_logps(model, again)
    assert all(torch.equal(on[s], trained[s]) and torch.equal(off[s], base[s]) and not torch.equal(on[s], off[s]) for s in on)
    card = (folder/"README.md").read_text()
    assert all(t in card for t in ("| objective | rdpo |", "| learning_rate | 0.001 |", "| rewards/image_margins |"))
    assert str(tmp_path) not in card


# ---- the stored reference

@pytest.mark.parametrize("layout", ["shared", "flat"])
def test_stored_equals_on_the_fly(tmp_path, layout):
    "Loss and gradients of a ragged batch; the model is called once per step, not twice"
    found = {}
    for reference in ("stored", "on_the_fly"):
        t = ready(tmp_path, noise=.1, projector="full", layout=layout, reference=reference)
        calls = []
        t.model.get_base_model().register_forward_hook(lambda *a: calls.append(1))
        loss = t.compute_loss(t.model, t.data_collator(INDEX))
        found[reference] = loss.item(), gradients(t, loss), len(calls)
    (a, g, n), (b, h, m) = found["stored"], found["on_the_fly"]
    assert a==pytest.approx(b, rel=2e-5) and abs(a-2*math.log(2))>1e-3 and distance(g, h)<1e-4 and (n, m)==(1, 2)


def test_a_second_run_scores_nothing(tmp_path):
    "Another beta, rate, rank and objective reuse the file; another rule or layout is refused by name"
    first = ready(tmp_path, reference="stored").reference_told
    again = ready(tmp_path, reference="stored", objective="dpo", beta=.5, lora_r=2, learning_rate=1e-5).reference_told
    assert first["scored"]>20 and first["reused"]==0 and again["scored"]==0 and again["reused"]>first["scored"]/2 and again["rechecked"]==8
    for kw in (dict(rule="top1_nonlabel"), dict(layout="flat")):
        with pytest.raises(ValueError, match=f"scored otherwise .{[*kw][0]}: "): ready(tmp_path, reference="stored", **kw)


def test_redraw_moves_the_policy_only(tmp_path):
    "Crops change from step to step as in mDPO's code; what is stored of the reference stays, and the same state of torch gives the same draws"
    t = ready(tmp_path, reference="stored", objective="mdpo", view="crop", redraw=True, layout="flat")
    torch.manual_seed(3)
    one, two = t.data_collator(INDEX[:2]), t.data_collator(INDEX[:2])
    torch.manual_seed(3)
    again = t.data_collator(INDEX[:2])
    assert not torch.equal(one["pixel_values"][4:], two["pixel_values"][4:]) and torch.equal(one["pixel_values"], again["pixel_values"])
    assert torch.equal(one["pixel_values"][:4], two["pixel_values"][:4])
    assert all(torch.equal(one["reference"][s], two["reference"][s]) for s in ("w", "l", "w@crop"))
    fixed = ready(tmp_path/"fixed", reference="stored", objective="mdpo", view="crop", layout="flat").data_collator
    assert torch.equal(fixed(INDEX[:2])["pixel_values"], fixed(INDEX[:2])["pixel_values"])


# ---- guards

def test_a_loss_that_is_no_number_names_its_records(tmp_path):
    "One weight at infinity, or one stored log-prob: the run stops before the optimizer steps"
    t = ready(tmp_path, PAIRS[:6], reference="stored")
    before = adapter(t)
    t.data_collator.reference["l"][4] = math.inf
    with pytest.raises(ValueError, match="record p04: loss .* from log-probs .*'reference l': inf"): t.train()
    assert all(torch.equal(v, before[n]) for n, v in adapter(t).items())
    broken = ready(tmp_path)
    with torch.no_grad(): next(p for n, p in broken.model.named_parameters() if "lora_B" in n).fill_(math.inf)
    with pytest.raises(ValueError, match="record p00, p01, p02, p03, p04, p05: loss nan from"): loss_of(broken)


# ---- every objective with every view

NEEDS_A_VIEW = [(o, v) for o in ("vdpo", "rdpo", "mdpo") for v in ("retrieved", "crop", "token_mask", "noise", "random", "blank")]


@pytest.mark.parametrize("objective,view", [("dpo", "retrieved"), ("sft", "retrieved"), *NEEDS_A_VIEW])
def test_two_epochs_of_everything(tmp_path, objective, view):
    t = ready(tmp_path, PAIRS[:6], objective=objective, view=view, reference="stored", num_train_epochs=2, per_device_train_batch_size=3)
    t.train()
    log = [r for r in t.state.log_history if "loss" in r]
    assert len(log)==4 and all(math.isfinite(r["loss"]) for r in log) and log[-1]["loss"]<log[0]["loss"]+.1


def test_a_new_view_and_objective_take_one_function_each(tmp_path, monkeypatch):
    def mirror(pairs, seed=0):
        from PIL import ImageOps
        return [ImageOps.mirror(p.image) for p in pairs]
    def hinge(batch, beta=.1): return (1-beta*(batch.ratio("w")-batch.ratio("l"))).clamp(0)
    monkeypatch.setitem(VIEWS, "mirror", mirror)
    monkeypatch.setitem(OBJECTIVES, "hinge", hinge); monkeypatch.setitem(STREAMS, "hinge", ("w", "l"))
    for kw in (dict(view="mirror"), dict(objective="hinge")):
        t = ready(tmp_path, PAIRS[:6], reference="stored", max_steps=1, **kw)
        t.train()
        assert math.isfinite(t.state.log_history[0]["loss"])


def test_names_of_trl_that_are_used():
    "What a new trl may break, by name"
    assert list(inspect.signature(DPOTrainer.compute_loss).parameters)==["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
    assert list(inspect.signature(DPOTrainer.create_optimizer).parameters)==["self", "model"]
    assert {n for n in vars(RDPOTrainer) if not n.startswith("__")}=={"compute_loss", "create_optimizer"}
    used = {"model", "args", "train_dataset", "processing_class", "data_collator", "peft_config", "callbacks"}
    assert used<=inspect.signature(DPOTrainer.__init__).parameters.keys()
    theirs, ours = ({f.name for f in fields(c)} for c in (DPOConfig, RDPOConfig))
    assert ours-theirs=={"objective", "view", "rule", "weights", "projector", "projector_learning_rate",
                         "lora_r", "lora_alpha", "lora_targets", "layout", "redraw", "reference", "reference_file", "reference_batch_size"}
    assert {"beta", "max_length", "loss_weights", "gradient_checkpointing", "remove_unused_columns", "bf16", "use_cpu", "seed",
            "data_seed", "dataloader_pin_memory"}<=theirs
    assert {"get_optimizer_cls_and_kwargs", "get_decay_parameter_names"}<=set(dir(DPOTrainer))


def test_objectives_resolve_lazily():
    "Importing dpo alone is enough, and does not load transformers or trl"
    code = ("import sys; from realign_nb.dpo import OBJECTIVES, streams; assert 'realign_nb.rdpo' not in sys.modules; "
            "f = OBJECTIVES['rdpo']; print(f.__name__, streams('vdpo'), [m for m in ('transformers', 'trl', 'peft') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip()=="rdpo ('w', 'w@retrieved') []"


def test_metrics_store_of_trl(tmp_path):
    t = ready(tmp_path)
    assert set(t._metrics)=={"train", "eval"} and t._metrics["train"]["new"]==[]            # dicts of lists, which `log` averages
    t._metrics["train"].clear(); t._metrics["train"]["x"] += [1., 3.]
    t.model.train(); t.log({"loss": 0.})
    assert t.state.log_history[-1]["x"]==2.
