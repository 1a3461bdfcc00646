"""Stored log-probs of the reference: the numbers, the file, what is refused, and what survives a kill."""
import json, math, os, signal, subprocess, sys, time
from copy import deepcopy
from dataclasses import replace
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from realign_nb.core import PreferencePair
from realign_nb.dpo import streams
from realign_nb.rdpo import VIEWS
from realign_nb.reference import ReferenceMismatch, ReferenceStore, fingerprint, reference_logps, row_key, score_reference, weight_hash
from realign_nb.rows import TooLong, branch_logps, flat_rows, needed_lengths
from realign_nb.tinyvlm import build
from realign_nb.world import DESCRIBE, KINDS, caption, draw, make_scenes, question

pytestmark = [pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
              pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")]
torch.set_num_threads(1)                 # the model is tiny: more threads only wait for each other
MODEL, PROCESSOR = build(seed=0)
RDPO = streams("rdpo")


def make_pairs(n=10):
    "Captions and yes/no questions in turn, so that every batch is ragged; the second image is the one before"
    rng, scenes = np.random.default_rng(0), make_scenes(n, "train", seed=5)
    pictures, texts = [draw(s) for s in scenes], [caption(s, rng) for s in scenes]
    words = [(DESCRIBE, texts[i], texts[i-1]+" It is late.") if i%4 else (question(KINDS[i]), "Yes.", "No, there is not.") for i in range(n)]
    return [PreferencePair(f"p{i:02d}", x, pictures[i], pictures[i-1], w, l, "[MASK]") for i, (x, w, l) in enumerate(words)]


PAIRS = make_pairs()


def score(store, pairs=PAIRS, names=RDPO, model=MODEL, processor=PROCESSOR, **kw):
    return score_reference(model, processor, pairs, store, names, **{**dict(batch_size=3), **kw})


def adapted(r=2, noise=.1, model=MODEL, **kw):
    "A copy with LoRA of random B, and with a projector that has moved away where it is trained"
    m = get_peft_model(deepcopy(model), LoraConfig(r=r, target_modules=r".*language_model.*\.(q|v)_proj", **kw))
    gen = torch.Generator().manual_seed(r)
    with torch.no_grad():
        for p in m.parameters():
            if p.requires_grad: p.add_(noise*torch.randn(p.shape, generator=gen))
    return m


class Counted:
    "Counts the sequences (segments in packed rows) that go through a model; notes the width of each batch"
    def __init__(self, model): self.model, self.n, self.widths = model, 0, []
    def __enter__(self):
        def count(module, args, kwargs): self.n += kwargs["pixel_values"].shape[0]; self.widths.append(kwargs["input_ids"].shape[1])
        self.handle = self.model.register_forward_pre_hook(count, with_kwargs=True)
        return self
    def __exit__(self, *args): self.handle.remove()


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    "One file of an unbroken run"
    path = tmp_path_factory.mktemp("scored")/"ref_logps.jsonl"
    out = score(ReferenceStore(path))
    assert out==dict(scored=30, reused=0, rechecked=0, worst=0., left=0)
    return path


def copy_of(path, folder): new = folder/path.name; new.write_bytes(path.read_bytes()); return new


def assert_same(a, b, rel): assert a.keys()==b.keys() and all(torch.allclose(a[s].double(), b[s].double(), rtol=rel, atol=0) for s in a), (a, b)


# ---- the numbers

@pytest.mark.parametrize("layout", ["flat", "shared"])
@pytest.mark.parametrize("rule", ["label", "top1_nonlabel"])
def test_stored_is_on_the_fly(layout, rule, tmp_path):
    "Float32, one ragged batch of all pairs with the adapter off; from memory, and read from the file again"
    store = ReferenceStore(tmp_path/"r.jsonl")
    model = adapted(modules_to_save=["multi_modal_projector"])
    score(store, model=model, layout=layout, rule=rule)
    rows = flat_rows(PAIRS, PROCESSOR)
    assert len({int(n) for n in rows["attention_mask"].sum(1)})>4
    with torch.no_grad(), model.disable_adapter(): fly = branch_logps(model, rows, rule)
    stored = reference_logps(PAIRS, store, RDPO)
    assert_same(stored, fly, 1e-5)
    assert {v.dtype for v in stored.values()}=={torch.float64}
    again = reference_logps(PAIRS, ReferenceStore(tmp_path/"r.jsonl"), RDPO)
    assert all(torch.equal(stored[s], again[s]) for s in RDPO)
    with torch.no_grad(): other = branch_logps(model, rows, rule)
    assert all((stored[s]-other[s]).abs().max()>.1 for s in RDPO), "the adapter would not be seen"


def test_released_rule_keeps_labels_of_w(scored):
    "Same numbers for w under both rules, others elsewhere; but not in one file"
    released = ReferenceStore(); score(released, rule="top1_nonlabel")
    a, b = (reference_logps(PAIRS, s, RDPO) for s in (ReferenceStore(scored), released))
    assert torch.allclose(a["w"], b["w"], rtol=1e-5) and all((a[s]-b[s]).abs().max()>1 for s in RDPO[1:])


def test_low_precision_within_tolerance():
    "bfloat16: other batches and an adapter that is off stay within the limits; every row is scored again"
    model = deepcopy(MODEL).bfloat16(); store = ReferenceStore()
    score(store, model=model)
    out = score(store, model=model, batch_size=1, recheck=99)
    assert out["rechecked"]==30 and 0<out["worst"]<.5
    score(store, model=adapted(model=model), recheck=99, batch_size=10)
    assert store.fingerprint["dtype"]=="bfloat16"


def test_model_is_left_as_it_was():
    "Training modes come back module by module, dropout does not touch the numbers, and no gradient is made"
    model = adapted(lora_dropout=.5)
    model.train(); model.base_model.model.model.vision_tower.eval()
    model.base_model.model.config.text_config.attention_dropout = .5
    for m in model.modules():
        if hasattr(m, "attention_dropout"): m.attention_dropout = .5
    modes = [m.training for m in model.modules()]
    a = ReferenceStore(); score(a, model=model, recheck=0)
    assert [m.training for m in model.modules()]==modes and {True, False}<=set(modes)
    assert all(p.grad is None for p in model.parameters())
    plain = ReferenceStore(); score(plain)
    assert_same(reference_logps(PAIRS, a, RDPO), reference_logps(PAIRS, plain, RDPO), 1e-5)
    broken = deepcopy(model); broken.get_base_model().lm_head.weight.data.fill_(math.nan)
    with pytest.raises(ValueError): score(ReferenceStore(), model=broken)
    assert [m.training for m in broken.modules()]==modes


# ---- what is scored, and what is not

def test_sweep_asks_for_what_is_missing(scored, tmp_path):
    "Counted in the model itself: sequences, not claims"
    file = copy_of(scored, tmp_path)
    def run(objective, view="retrieved", model=MODEL, **kw):
        with Counted(model) as c: out = score(ReferenceStore(file), names=streams(objective, view), view=view, model=model, recheck=0, **kw)
        assert c.n==out["scored"] and out["scored"]+out["reused"]==len(streams(objective, view))*10 and out["left"]==0
        return c.n
    assert [run("dpo"), run("vdpo"), run("rdpo"), run("rdpo", model=adapted(8).get_base_model())]==[0]*4
    assert [run("rdpo", "blank"), run("vdpo", "blank"), run("rdpo", "random", seed=1), run("vdpo", "random", seed=1)]==[10, 0, 10, 0]
    assert 0<run("vdpo", "random", seed=2)<10                                  # some pairs draw the same picture again
    assert score(ReferenceStore(file), recheck=5)["rechecked"]==5


def test_batches_in_order_of_length():
    with Counted(MODEL) as c: score(ReferenceStore())
    assert c.widths==sorted(c.widths) and len(c.widths)==4 and c.widths[0]<c.widths[-1]


def test_each_row_once():
    "Pairs that share prompt, image and answer share the number, in either layout, also where w and l, or v and v_l, are equal"
    twin, same = replace(PAIRS[1], id="twin", rejected="Something else."), replace(PAIRS[2], id="same", rejected=PAIRS[2].chosen,
                                                                                  retrieved_image=PAIRS[2].image)
    pairs = [PAIRS[1], twin, same, replace(PAIRS[1], id="copy", image=PAIRS[1].image.copy())]
    for layout in ("flat", "shared"):
        store = ReferenceStore()
        assert score(store, pairs, layout=layout)["scored"]==3+1+1
        logps = reference_logps(pairs, store, RDPO)
        assert logps["w"][0]==logps["w"][1]==logps["w"][3] and logps["w"][2]==logps["l"][2]==logps["w@retrieved"][2]
        assert logps["l"][0]!=logps["l"][1]


def test_key_is_made_of_contents(tmp_path):
    a, b = tmp_path/"a.png", tmp_path/"b.png"
    for f in (a, b): PAIRS[0].image.save(f); os.utime(f, (1, 1))                # later changes are later, however coarse the clock
    key = row_key("x", "y", PAIRS[0].image)
    assert row_key("x", "y", a)==row_key("x", "y", str(b))==key                 # a name is not part of it
    dot = PAIRS[0].image.copy(); dot.putpixel((0, 0), (1, 2, 3)); dot.save(a)
    assert row_key("x", "y", a)==row_key("x", "y", dot)!=key                    # the file has changed meanwhile
    assert len({key, row_key("x ", "y", b), row_key("x", "y ", b), row_key("xy", "", b), row_key("x", "y", b, "top1_nonlabel")})==5
    store = ReferenceStore(); pair = replace(PAIRS[0], image=str(b), retrieved_image=str(b)); score(store, [pair])
    dot.save(b)
    assert score(store, [pair], recheck=0)==dict(scored=2, reused=0, rechecked=0, worst=0., left=0) # v = v_l: one number for both
    with pytest.raises(ValueError, match="no such image file"): score(store, [replace(pair, image=str(tmp_path/"none.png"))])


def test_second_pictures_can_be_given():
    "A view drawn once by the caller, in place of `VIEWS`"
    second, store = VIEWS["random"](PAIRS, 3), ReferenceStore()
    names = ("w", "w@random")
    score(store, names=names, view="random", second=second)
    with torch.no_grad(): fly = branch_logps(MODEL, flat_rows(PAIRS, PROCESSOR, "random", names, second))
    assert_same(reference_logps(PAIRS, store, names, "random", second), fly, 1e-5)
    assert_same(reference_logps(PAIRS, store, names, "random", seed=3), fly, 1e-5)
    with pytest.raises(ValueError, match="9 second images for 10 pairs"): score(store, names=names, view="random", second=second[:9])
    with pytest.raises(ValueError, match="stream 'w@random' is not one of w, l, w@blank"): score(store, names=names, view="blank")


# ---- the file

def test_shards_together_are_the_whole(scored, tmp_path):
    "Three workers in any order, one of them twice: files of their own, no row twice, all rows of an unbroken run"
    path, total = tmp_path/"r.jsonl", 0
    for i in (2, 0, 2, 1): total += score(ReferenceStore(path, shard=(i, 3)), recheck=0)["scored"]
    assert sorted(f.name for f in tmp_path.iterdir())==[f"r-{i}of3.jsonl" for i in (1, 2, 3)] and total==30
    lines = [json.loads(l) for f in sorted(tmp_path.iterdir()) for l in f.read_text().splitlines()[1:]]
    assert sum(len(l["rows"]) for l in lines)==30 and min(f.read_text().count("\n") for f in tmp_path.iterdir())>1
    whole, parts = ReferenceStore(scored), ReferenceStore(path)
    assert whole.rows.keys()==parts.rows.keys()
    assert_same(reference_logps(PAIRS, parts, RDPO), reference_logps(PAIRS, whole, RDPO), 1e-5)
    assert score(ReferenceStore(path))["scored"]==0 and not path.exists()       # nothing missing: nothing written
    early = ReferenceStore(tmp_path/"new.jsonl", shard=(0, 2))
    assert score(early)["left"]>0
    with pytest.raises(ValueError, match=r"of 30 log-probs are not stored, first record p0\d, stream 'w'; call score_reference"):
        reference_logps(PAIRS, early, RDPO)


def test_duplicates(scored, tmp_path):
    "A row that two workers wrote counts once; with two values it is refused"
    file = copy_of(scored, tmp_path)
    head, first, *_ = file.read_text().splitlines(keepends=True)
    sibling = tmp_path/"ref_logps-1of2.jsonl"; sibling.write_text(head+first)
    (tmp_path/"ref_logps-notes-1of2.jsonl").write_text("a name that merely looks alike")
    store = ReferenceStore(file); assert len(store)==30
    key, logp, tokens = json.loads(first)["rows"][0]
    store.append({key: (logp, tokens)}); assert file.read_bytes()==scored.read_bytes()
    for row in ([key, logp-.1, tokens], [key, logp, tokens+1]):
        sibling.write_text(head+json.dumps(dict(rows=[row]))+"\n")
        with pytest.raises(ReferenceMismatch, match=r"ref_logps-1of2.jsonl, line 2: .* elsewhere .*score into another file"): ReferenceStore(file)


KILLED = """
import sys, time, torch
torch.set_num_threads(1)
from test_reference import PAIRS, ReferenceStore, score
class slow:
    def __init__(self, total, done, name): pass
    def update(self, n): time.sleep(.2)
    def close(self): pass
score(ReferenceStore(sys.argv[1]), progress=slow)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_kill_and_go_on(scored, tmp_path):
    "SIGKILL from outside while another process scores; this one goes on, and the file is that of an unbroken run, byte by byte"
    file = tmp_path/"ref_logps.jsonl"
    paths = os.pathsep.join([os.path.dirname(__file__), os.getcwd(), *sys.path])
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(file)], env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    end = time.monotonic()+120
    while (not file.exists() or file.read_bytes().count(b"\n")<3) and child.poll() is None and time.monotonic()<end: time.sleep(.01)
    os.kill(child.pid, signal.SIGKILL); assert child.wait()==-signal.SIGKILL
    there = file.read_bytes().count(b"\n")
    assert 3<=there<len(scored.read_text().splitlines())
    out = score(ReferenceStore(file))
    assert out["reused"]+out["scored"]==30 and 0<out["scored"]<30 and out["rechecked"]==min(8, out["reused"])
    assert file.read_bytes()==scored.read_bytes()


@pytest.mark.parametrize("share", [.02, .31, .6, .999])
def test_torn_anywhere(share, scored, tmp_path):
    "The file cut at any byte: reading leaves it alone, scoring cuts off the torn line, says so, and ends with the unbroken file"
    whole, file = scored.read_bytes(), tmp_path/"ref_logps.jsonl"
    torn = whole[:int(share*len(whole))]; file.write_bytes(torn)
    store = ReferenceStore(file); assert file.read_bytes()==torn
    with pytest.warns(UserWarning, match="dropped a torn last line"): score(store)
    assert file.read_bytes()==whole


@pytest.mark.parametrize("row", [[None, -1., 3], ["k", None, 3], ["k", math.nan, 3], ["k", -math.inf, 3], ["k", -1., 0], ["k", -1.], "text"],
                         ids=["no key", "null", "NaN", "infinite", "no tokens", "two fields", "no list"])
def test_impossible_rows(row, scored, tmp_path):
    file = copy_of(scored, tmp_path); n = len(file.read_text().splitlines())
    with open(file, "a") as f: f.write(json.dumps(dict(rows=[row]))+"\n")
    with pytest.raises(ValueError, match=rf"ref_logps.jsonl, line {n+1}: .* is not a key, a finite log-prob and a number of tokens"): ReferenceStore(file)


def test_not_a_store(scored, tmp_path):
    file = copy_of(scored, tmp_path); lines = file.read_text().splitlines(keepends=True)
    for text, where in (("".join(lines[1:]), 1), (lines[0]+lines[1][:40]+"\n"+lines[2], 2), (lines[0]+"[1]\n", 2), ('{"id": 1}\n', 1)):
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"ref_logps.jsonl, line {where}: no (rows|fingerprint) of stored log-probs; restore"): ReferenceStore(file)


# ---- what is refused

def changed(**kw):
    "A copy of the model whose text configuration differs"
    m = deepcopy(MODEL)
    for k, v in kw.items(): setattr(m.config.text_config, k, v)
    return m


def other_weight():
    m = deepcopy(MODEL); m.model.vision_tower.encoder.layers[1].mlp.fc1.weight.data[100, 100] += 1e-4
    return m


def other_template():
    p = deepcopy(PROCESSOR); p.chat_template = p.chat_template.replace("ASSISTANT", "BOT")
    return p


def eager():
    m = deepcopy(MODEL); m.set_attn_implementation("eager")
    return m


@pytest.mark.parametrize("fields, make", [
    (["weights"], lambda: dict(model=other_weight())), (["weights"], lambda: dict(model=adapted().merge_and_unload())),
    (["config"], lambda: dict(model=changed(rms_norm_eps=1e-5))), (["template"], lambda: dict(processor=other_template())),
    (["attention"], lambda: dict(model=eager())), (["weights", "dtype"], lambda: dict(model=deepcopy(MODEL).half())),
    (["rule", "layout"], lambda: dict(rule="top1_nonlabel", layout="shared"))])
def test_refused_with_every_field(fields, make, scored, tmp_path):
    file = copy_of(scored, tmp_path); kw = make()
    mine = fingerprint(MODEL, PROCESSOR)
    theirs = fingerprint(kw.get("model", MODEL), kw.get("processor", PROCESSOR), kw.get("rule", "label"), kw.get("layout", "flat"))
    with pytest.raises(ReferenceMismatch) as e: score(ReferenceStore(file), **kw)
    assert [k for k in mine if f"{k}: {mine[k]!r} in ref_logps.jsonl, {theirs[k]!r} in this run" in str(e.value)]==fields
    assert [k for k in mine if mine[k]!=theirs[k]]==fields and file.read_bytes()==scored.read_bytes()
    with pytest.raises(ReferenceMismatch, match="in the call"): ReferenceStore(file, theirs)


def test_fingerprint_is_the_base_models(tmp_path):
    "Adapters of any rank, trained projectors, a state that the processor keeps, saving and loading: all the same model"
    mine = fingerprint(MODEL, PROCESSOR)
    used = deepcopy(PROCESSOR); used.tokenizer.padding_side = "left"; used.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
    for m in (adapted(2), adapted(8, modules_to_save=["multi_modal_projector"]), adapted(2, use_dora=True)): assert fingerprint(m, used)==mine
    MODEL.save_pretrained(tmp_path); PROCESSOR.save_pretrained(tmp_path)
    assert fingerprint(type(MODEL).from_pretrained(tmp_path), PROCESSOR)==mine
    with pytest.raises(ValueError, match="not in this process .* before the model is sharded"): weight_hash(deepcopy(MODEL).to("meta"))
    inside = deepcopy(MODEL); inside.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="carries an adapter that cannot be switched off"): score(ReferenceStore(), model=inside)


def test_tampered_number_is_found(scored, tmp_path):
    "One number moved by 0.002 nats, beyond float32; the record is named"
    file = copy_of(scored, tmp_path); head, first, *rest = file.read_text().splitlines(keepends=True)
    line = json.loads(first); line["rows"][0][1] -= .002*max(1, abs(line["rows"][0][1])/100)
    file.write_text(head+json.dumps(line)+"\n"+"".join(rest))
    with pytest.raises(ReferenceMismatch, match=r"1 of 30 log-probs that were scored again differ \(record p\d\d, stream '[wl@a-z]+': stored"):
        score(ReferenceStore(file), recheck=30)


def test_bad_records_are_named_and_nothing_is_written(tmp_path):
    store = ReferenceStore(tmp_path/"r.jsonl")
    with Counted(MODEL) as c:
        longest = max(needed_lengths(PAIRS, PROCESSOR).values())                # only one record is too long, and it would come last
        with pytest.raises(TooLong, match=rf"record p\d\d needs {longest} tokens, the model holds {longest-1}"): score(store, max_length=longest-1)
        assert c.n==0
        with pytest.raises(ValueError, match="record p03: its rejected response is empty"): score(store, [replace(PAIRS[3], rejected=" ")])
        with pytest.raises(ValueError, match="rule='top1' is unknown; use one of label, top1_nonlabel"): score(ReferenceStore(), rule="top1")
        with pytest.raises(ValueError, match="layout='auto' is unknown; use one of flat, shared"): score(ReferenceStore(), layout="auto")
        with pytest.raises(ValueError, match="cannot take shared rows: its positions are not rotary"):
            score(ReferenceStore(), model=changed(rope_parameters=None), layout="shared")
        with pytest.raises(ValueError, match="the store is empty; call score_reference first"): reference_logps(PAIRS, ReferenceStore(), RDPO)
        assert c.n==0
    model = deepcopy(MODEL); model.lm_head.weight.data.fill_(math.nan)
    other = ReferenceStore(tmp_path/"n.jsonl")
    with pytest.raises(ValueError, match=r"no finite log-prob to p01 \(w\), p01 \(l\)"): score(other, PAIRS[1:2], ("w", "l"), model=model)
    assert len(other)==len(store)==0 and (tmp_path/"n.jsonl").read_text().count("\n")==1


def test_after_training_the_reference_is_the_same(scored, tmp_path):
    "The trainer's own model after two steps, with a trained projector: every stored row is scored again, and is bit for bit what it was"
    from realign_nb.trainer import RDPOConfig, make_trainer
    config = RDPOConfig(output_dir=str(tmp_path), use_cpu=True, projector="full", lora_r=2, lora_alpha=4, learning_rate=1e-2, max_steps=2,
                        per_device_train_batch_size=2, gradient_accumulation_steps=1, save_strategy="no", disable_tqdm=True, layout="flat")
    processor = deepcopy(PROCESSOR)
    trainer = make_trainer(deepcopy(MODEL), processor, PAIRS, config); trainer.train()
    file = copy_of(scored, tmp_path)
    assert score(ReferenceStore(file), model=trainer.model, processor=processor, recheck=30)["worst"]<1e-4
    fresh = tmp_path/"fresh"/"ref_logps.jsonl"; score(ReferenceStore(fresh), model=trainer.model, processor=processor)
    assert fresh.read_bytes()==scored.read_bytes()
