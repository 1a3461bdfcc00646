"""One training step of eq. (1) as different programs compute it: FLOPs, tokens, processor time, memory, and the same loss in all of them.

    python benchmarks/train_step.py [--geometry B] [--steps 5] [--only NAME ...] [--out benchmarks/results/train_step.json]
    python benchmarks/train_step.py --device cuda [--geometry llava-1.5-7b llava-next-7b]       # pairs a second, utilisation, memory, hours

Random LLaVA, LoRA with random A and B on the language model only, AdamW, clipped gradients, the same pairs in every step. On the CPU: float32, one thread,
two pairs a step; each variant runs in a process of its own and takes one step to warm up, then the median of the next counts. Times are processor
seconds of forward, backward and optimizer; making the rows is timed on its own. Memory is what the steps add to the process at their highest (VmHWM of
Linux, reset when the model and the rows are there): as it is, and in a second process in which every tensor has a mapping of its own and is given back at
once (MALLOC_MMAP_THRESHOLD_), which leaves out the holes in the heap, about half of the former. FLOPs are those of the matrix products and of
attention, two per multiply-add; attention under a causal mask is counted in full, as is usual, and its backward as five products. A token counts each
time it enters the language model, padding too.

released style      the authors' program in cost: a forward per branch, policy and reference, all logits with log_softmax, each image encoded twice per
                    forward. In value it is scored by the label rule here, and it is spared the cross-entropy that the original computes and drops.
naive               the same with one encoding per forward
TRL, plain DPO      trl.DPOTrainer as it is, without the visual branch: less work, another loss
TRL, exact rDPO     trl.DPOTrainer as it is on doubled pairs with loss_weights=[2.0]. On the CPU its head projects every position, on CUDA the labelled
                    ones only; `gflop_compact` is what is left then (four products of head and tokens are counted: two forwards, one recomputed, one
                    gradient), by arithmetic, since nothing public switches it. Limits are checked against this lower number.
ours                make_trainer(...) and its compute_loss, flat or shared rows, reference on the fly or stored. What storing it costs, once per pair, is
                    the line "scoring the reference".
Started by hand only.
"""
import argparse, gc, json, os, platform, statistics, subprocess, sys, tempfile, time, warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import (AutoModelForImageTextToText, CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig,
                          LlavaNextImageProcessorPil, LlavaNextProcessor, LlavaProcessor, PreTrainedTokenizerFast)
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from realign_nb.adapters import lora_config
from realign_nb.attention import share_prefixes
from realign_nb.core import PreferencePair
from realign_nb.models import chat_text, vision_tower
from realign_nb.reference import fingerprint, score_reference
from realign_nb.store import ReferenceStore
from realign_nb.trainer import RDPOConfig, make_trainer, pair_dataset

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy")
PATCH, BETA, RATE, SEED, PAIRS_OF_THE_PAPER = 14, .1, 1e-4, 0, 11_000
# layers, hidden size, feed-forward, heads, vocabulary; the same of the tower, side of the picture; prompt, response; LoRA rank. `tiles`: any-resolution
TOWER = dict(tower=24, tower_hidden=1024, tower_ff=4096, tower_heads=16, side=336)
VICUNA = dict(layers=32, hidden=4096, ff=11008, heads=32, vocabulary=32000, **TOWER, prompt=40, response=100, rank=128)
GEOMETRY = {
    "smoke": dict(layers=2, hidden=32, ff=64, heads=4, vocabulary=128, tower=2, tower_hidden=32, tower_ff=64, tower_heads=4, side=28, prompt=8, response=6, rank=4),
    "A": dict(layers=6, hidden=256, ff=688, heads=4, vocabulary=32000, tower=4, tower_hidden=128, tower_ff=512, tower_heads=4, side=140, prompt=24, response=40, rank=16),
    "B": dict(layers=8, hidden=512, ff=1376, heads=8, vocabulary=1024, tower=6, tower_hidden=128, tower_ff=512, tower_heads=4, side=336, prompt=40, response=100, rank=16),
    "llava-1.5-7b": VICUNA,
    "llava-next-7b": dict(VICUNA, tiles=2)}
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:"]
TEMPLATE = ("{% for m in messages %}{% if m['role']=='user' %}<s>USER: {% for p in m['content'] %}"
            "{% if p['type']=='image' %}<image> {% else %}{{ p['text'] }}{% endif %}{% endfor %} ASSISTANT:"
            "{% else %} {{ m['content'][0]['text'] }}</s>{% endif %}{% endfor %}")


# ---- the model and the pairs

def tokenizer(g):
    "Words of the form w17, one token each."
    words = SPECIAL+[f"w{i}" for i in range(g["vocabulary"]-len(SPECIAL))]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL[:5]])
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   padding_side="left", extra_special_tokens=dict(image_token="<image>"))


def build(g, device="cpu", dtype=torch.float32):
    "Random model of this geometry on the device, and its processor."
    torch.manual_seed(SEED)
    side, sizes = g["side"], [[k*g["side"], n*g["side"]] for k in (1, 2) for n in (1, 2) if k*n>1]
    vision = CLIPVisionConfig(hidden_size=g["tower_hidden"], intermediate_size=g["tower_ff"], num_hidden_layers=g["tower"], num_attention_heads=g["tower_heads"],
                              image_size=side, patch_size=PATCH)
    text = LlamaConfig(vocab_size=g["vocabulary"], hidden_size=g["hidden"], intermediate_size=g["ff"], num_hidden_layers=g["layers"], num_attention_heads=g["heads"],
                       num_key_value_heads=g["heads"], max_position_embeddings=8192, initializer_range=.04, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    common = dict(vision_config=vision, text_config=text, image_token_index=4, vision_feature_select_strategy="default")
    image = dict(size=dict(shortest_edge=side), crop_size=dict(height=side, width=side))
    if "tiles" in g:
        config = LlavaNextConfig(**common, image_grid_pinpoints=sizes)
        images, kind = LlavaNextImageProcessorPil(**image, image_grid_pinpoints=sizes), LlavaNextProcessor
    else:
        config = LlavaConfig(**common, image_seq_length=(side//PATCH)**2)
        images, kind = CLIPImageProcessorPil(**image), LlavaProcessor
    with torch.device(device): model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    return model, kind(images, tokenizer(g), PATCH, "default", TEMPLATE, num_additional_image_tokens=1)


def make_pairs(g, n):
    "Pairs of exactly this many tokens; the rejected response differs from the chosen one in every sixth word."
    rng, side = np.random.default_rng(SEED), g["side"]*g.get("tiles", 1)
    def words(k): return [f"w{i}" for i in rng.integers(g["vocabulary"]-len(SPECIAL), size=k)]
    def picture(): return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
    pairs = []
    for i in range(n):
        prompt, chosen = words(g["prompt"]-3), words(g["response"]-1)                 # beside <s>, USER:, ASSISTANT: and </s>
        rejected = [new if k%6==0 else old for k, (old, new) in enumerate(zip(chosen, words(len(chosen))))]
        pairs.append(PreferencePair(f"pair{i}", " ".join(prompt), picture(), picture(), " ".join(chosen), " ".join(rejected), "[MASK]"))
    return pairs


def adapt(model):
    "The same random LoRA weights in every variant, so that policy and reference differ."
    gen = torch.Generator().manual_seed(SEED+1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name: p.copy_(torch.randn(p.shape, generator=gen)*(.05 if "lora_B" in name else p.shape[1]**-.5))
    return model


# ---- the variants: each makes (model with adapter, collate() -> rows, loss(rows) -> scalar)

def text_row(p, image, processor):
    "A pair as TRL wants it."
    eos = processor.tokenizer.eos_token
    return dict(images=[image], prompt=chat_text(processor, p.prompt), chosen=p.chosen+eos, rejected=p.rejected+eos)


def branches(pairs, processor):
    "Rows (w|v), (l|v), (w|v_l), each a batch of one row per pair, made by TRL's collator."
    collate, n = DataCollatorForVisionPreference(processor), len(pairs)
    a, b = (collate([text_row(p, getattr(p, field), processor) for p in pairs]) for field in ("image", "retrieved_image"))
    return [{k: v[s] for k, v in rows.items()} for rows, s in ((a, slice(n)), (a, slice(n, None)), (b, slice(n)))]


def separate(g, model, processor, pairs, device, twice=False, checkpointing=False):
    "Three forwards of the policy and three of the reference, all logits."
    model = get_peft_model(model, lora_config(model, g["rank"], 2*g["rank"]))
    if checkpointing: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    def score(rows, kept):
        inputs = {k: v for k, v in rows.items() if k!="completion_mask"}
        if twice: model.get_base_model().get_image_features(**{k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes")})
        logits = model(**inputs, use_cache=False).logits
        kept.append(logits)                                                            # for the metrics, until the step is done
        logps = logits[:, :-1].float().log_softmax(-1).gather(2, rows["input_ids"][:, 1:, None]).squeeze(2)
        return (logps*rows["completion_mask"][:, 1:]).sum(1)
    def loss(rows):
        kept = []
        w, l, other = (score(r, kept) for r in rows)
        with torch.no_grad(), model.disable_adapter(): w0, l0, other0 = (score(r, kept) for r in rows)
        return -(F.logsigmoid(BETA*((w-w0)-(l-l0)))+F.logsigmoid(BETA*((w-w0)-(other-other0)))).mean()
    return model, lambda: branches(pairs, processor), loss


def trl(g, model, processor, pairs, device, doubled=False, checkpointing=False):
    "trl.DPOTrainer, with its own collator or with doubled pairs."
    def twofold(examples):
        w, l, other = branches([pairs[e["index"]] for e in examples], processor)
        return {k: torch.cat([w[k], w[k], l[k], other[k]]) for k in w}
    rows = pair_dataset(pairs) if doubled else Dataset.from_list([text_row(p, p.image, processor) for p in pairs])
    config = DPOConfig(output_dir=tempfile.gettempdir(), beta=BETA, use_cpu=device=="cpu", bf16=device!="cpu", gradient_checkpointing=checkpointing, max_length=None,
                       loss_weights=[2.] if doubled else None, remove_unused_columns=not doubled, report_to="none")
    trainer = DPOTrainer(model=model, args=config, train_dataset=rows, processing_class=processor, data_collator=twofold if doubled else None,
                         peft_config=lora_config(model, g["rank"], 2*g["rank"]))
    return trainer_step(trainer)


def ours(g, model, processor, pairs, device, layout="shared", reference="stored", checkpointing=False):
    "The library's trainer."
    with tempfile.TemporaryDirectory() as folder:                                      # the stored log-probs
        config = RDPOConfig(output_dir=folder, beta=BETA, use_cpu=device=="cpu", layout=layout, reference=reference, projector="frozen", lora_r=g["rank"],
                            lora_alpha=2*g["rank"], gradient_checkpointing=checkpointing)
        return trainer_step(make_trainer(model, processor, pairs, config))


def trainer_step(trainer):
    "A trainer's public hooks, called as `train()` calls them."
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs)
    def collate(): return trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    return trainer.model, collate, lambda rows: trainer.compute_loss(trainer.model, rows)


VARIANTS = {
    "released style": (separate, dict(twice=True)),
    "naive": (separate, {}),
    "naive, checkpointing": (separate, dict(checkpointing=True)),
    "TRL, plain DPO": (trl, {}),
    "TRL, exact rDPO": (trl, dict(doubled=True)),
    "TRL, exact rDPO, checkpointing": (trl, dict(doubled=True, checkpointing=True)),
    "ours, flat, on the fly": (ours, dict(layout="flat", reference="on_the_fly")),
    "ours, flat, stored": (ours, dict(layout="flat")),
    "ours, flat, stored, checkpointing": (ours, dict(layout="flat", checkpointing=True)),
    "ours, shared, on the fly": (ours, dict(reference="on_the_fly")),
    "ours, shared, stored": (ours, {}),
    "ours, shared, stored, checkpointing": (ours, dict(checkpointing=True))}
ANOTHER_LOSS, SCORING = {"TRL, plain DPO"}, "scoring the reference"
LIMITS = {"ours, shared, stored": ("released style", .5), "ours, shared, on the fly": ("released style", .72)}        # of FLOPs
TRL_LIMIT = .4                                                                     # of TRL's exact rDPO with its head on the labelled positions only


# ---- what is measured

def counting():
    "torch's counter, and what it does not know: fused attention on the CPU, and matrix products added in place."
    aten = torch.ops.aten
    def attention(q, k, v, *args, out_shape=None, **kw): return sdpa_flop_count(q, k, v)
    def backward(grad, q, k, v, *args, out_shape=None, **kw): return sdpa_backward_flop_count(grad, q, k, v)
    def added(c, a, b, *args, out_shape=None, **kw): return 2*a[0]*a[1]*b[1]
    return FlopCounterMode(display=False, custom_mapping={aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward, aten.addmm_: added})


def counted(model, run):
    "FLOPs, those of attention, tokens through the language model and pictures through the tower while `run()` runs."
    seen, base = dict(tokens=0, encodings=0), model.get_base_model() if hasattr(model, "get_base_model") else model
    def text(module, args, kw): seen["tokens"] += kw["inputs_embeds"].shape[:2].numel()
    def tower(module, args, kw): seen["encodings"] += len(args[0] if args else kw["pixel_values"])
    hooks = [m.register_forward_pre_hook(f, with_kwargs=True) for m, f in ((base.model.language_model, text), (vision_tower(base), tower))]
    with counting() as counter: run()
    for h in hooks: h.remove()
    attention = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
    return dict(gflop=counter.get_total_flops()/1e9, gflop_attention=attention/1e9, **seen)


def status(key): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))/1024


def to(rows, device):
    "Every tensor in dicts and lists on the device."
    if isinstance(rows, Mapping): return {k: to(v, device) for k, v in rows.items()}
    if isinstance(rows, list): return [to(v, device) for v in rows]
    return rows.to(device) if torch.is_tensor(rows) else rows


class Meter:
    "Seconds and memory of a device: processor time and resident memory, or wall time and allocated memory of a GPU."
    def __init__(self, device): self.gpu = device!="cpu"

    def clock(self):
        if not self.gpu: return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def reset(self):
        gc.collect()
        if self.gpu: torch.cuda.reset_peak_memory_stats()
        else: Path("/proc/self/clear_refs").write_text("5")                            # VmHWM starts again from here
        self.base = torch.cuda.memory_allocated()/2**20 if self.gpu else status("VmRSS")

    def peak(self):
        top = torch.cuda.max_memory_allocated()/2**20 if self.gpu else status("VmHWM")
        return dict(extra_mib=round(top-self.base), peak_mib=round(top))


def prepared(name, g, n_pairs, device):
    "A variant on a new model: (model, collate, step(rows) -> (loss, gradient norm), gradients(rows))."
    make, options = VARIANTS[name]
    dtype = torch.float32 if device=="cpu" else torch.bfloat16
    base, processor = build(g, device, dtype)
    model, collate, loss = make(g, base, processor, make_pairs(g, n_pairs), device, **options)
    adapt(model).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.)
    def gradients(rows):
        with torch.autocast(device, torch.bfloat16, enabled=device!="cpu"): value = loss(rows)
        value.backward()
        return value
    def step(rows):
        value = gradients(rows).item()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.).item()
        optimizer.step(); optimizer.zero_grad()
        return value, norm
    return model, lambda: to(collate(), device), step, gradients


def scoring(g, n_pairs, device, steps, lean=False):
    "The reference, stored: as `measure`, for as many pairs; what is done once per run, hashing the weights above all, is timed on its own."
    model, processor = build(g, device, torch.float32 if device=="cpu" else torch.bfloat16)
    pairs, meter, seconds, starting = make_pairs(g, n_pairs), Meter(device), [], []
    identity = fingerprint(share_prefixes(model), processor, "label", "shared")
    def run(store): score_reference(model, processor, pairs, store, ("w", "l", "w@retrieved"), layout="shared", batch_size=n_pairs, recheck=0)
    meter.reset()
    for _ in range(steps+1):
        store, times = ReferenceStore(None, identity), [meter.clock()]
        for _ in range(2): run(store); times.append(meter.clock())                     # the second time nothing is left to score
        starting.append(times[2]-times[1]); seconds.append(times[1]-times[0]-starting[-1])
    return dict(seconds=seconds[steps>0:], start_seconds=statistics.median(starting), pairs=n_pairs, **meter.peak(),
                **({} if lean else counted(model, lambda: run(ReferenceStore(None, identity)))))


def compact(g, tokens, n_pairs, rows):
    "GFLOP that TRL saves where its head leaves out positions without a label: four products of `tokens/2` positions."
    unlabelled = tokens/2-rows-rows*g["response"]                                      # the last position of a row is never projected
    return 4*2*g["hidden"]*g["vocabulary"]*unlabelled/1e9


def measure(name, g, n_pairs=2, steps=5, device="cpu", lean=False):
    "Loss and gradient norm of the first step, seconds of the next ones, memory of all, and (unless `lean`) the FLOPs of one more."
    if name==SCORING: return scoring(g, n_pairs*(1 if device=="cpu" else 4), device, steps, lean)
    model, collate, step, gradients = prepared(name, g, n_pairs, device)
    meter, seconds, making = Meter(device), [], []
    rows = collate(); meter.reset()
    for i in range(steps+1):
        start = time.process_time(); rows = collate(); making.append(time.process_time()-start)
        start = meter.clock(); value, norm = step(rows); seconds.append(meter.clock()-start)
        if i==0: first = dict(loss=value, gradient_norm=norm)
    out = dict(first, seconds=seconds[steps>0:], rows_seconds=statistics.median(making[steps>0:]), pairs=n_pairs, **meter.peak())
    if lean or device!="cpu": return out
    out |= counted(model, lambda: gradients(rows))
    if name.startswith("TRL"):
        out["gflop_compact"] = out["gflop"]-compact(g, out["tokens"], n_pairs, n_pairs*(4 if "exact" in name else 2))
    return out


def extrapolated(name, g, n_pairs, device):
    "FLOPs and tokens of a step without recomputation, from two and three layers: beyond the first, each layer costs the same."
    found = []
    for layers in (2, 3):
        model, collate, _, gradients = prepared(name.removesuffix(", checkpointing"), dict(g, layers=layers), n_pairs, device)
        found.append(counted(model, lambda: gradients(collate())))
        del model, collate, gradients; gc.collect()
        if device!="cpu": torch.cuda.empty_cache()
    return dict(found[0], **{k: found[0][k]+(g["layers"]-2)*(found[1][k]-found[0][k]) for k in ("gflop", "gflop_attention")})


def matmul_rate(seconds=2., n=8192):
    "TFLOP/s of bf16 matrix products on this GPU, the highest of some turns."
    a, b, best, meter = (*torch.randn(2, n, n, device="cuda", dtype=torch.bfloat16), 0., Meter("cuda"))
    end = time.perf_counter()+seconds
    while time.perf_counter()<end:
        start = meter.clock()
        for _ in range(10): a@b
        best = max(best, 10*2*n**3/(meter.clock()-start)/1e12)
    return best


# ---- one run over all variants

def child(a):
    "One variant in this process; a line of JSON."
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1 if a.device=="cpu" else os.cpu_count())
    g = GEOMETRY[a.geometry[0]]
    try:
        out = {} if a.device=="cpu" or a.child==SCORING else extrapolated(a.child, g, a.pairs, a.device)
        out |= measure(a.child, g, a.pairs, a.steps, a.device, a.lean)
    except torch.cuda.OutOfMemoryError as e: out = dict(error=f"out of memory: {str(e).splitlines()[0]}")
    print("\n"+json.dumps(out))


def run_child(name, geometry, a, lean=False):
    "What the variant measures in a process of its own; `lean`: its memory without holes in the heap."
    command = [sys.executable, __file__, "--child", name, "--geometry", geometry, "--device", a.device, "--steps", str(1 if lean else a.steps), "--pairs", str(a.pairs)]
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536") if lean else None
    done = subprocess.run(command+["--lean"]*lean, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode: raise SystemExit(f"the variant {name!r} broke off; its error stands above")
    return json.loads(done.stdout.splitlines()[-1])


def agree(found):
    "Every rDPO variant has the loss and the gradient norm of the naive one."
    rdpo = {k: v for k, v in found.items() if k not in ANOTHER_LOSS and "loss" in v}
    expected = rdpo.get("naive") or next(iter(rdpo.values()), None)
    for name, v in rdpo.items():
        for key, tolerance in (("loss", 2e-5), ("gradient_norm", 1e-4)):
            assert abs(v[key]-expected[key])<=tolerance*abs(expected[key]), f"{name}: {key} {v[key]} against {expected[key]}"


def condensed(v):
    "Median, fastest and slowest in the place of all seconds; figures rounded."
    times = v.pop("seconds")
    v |= dict(seconds=statistics.median(times), fastest=min(times), slowest=max(times), encodings_per_pair=v.pop("encodings")/v["pairs"])
    return {k: round(x, 7 if k in ("loss", "gradient_norm") else 4) if isinstance(x, float) else x for k, x in v.items()}


def ratios(found):
    "Each variant against the released style, where that was run."
    base = found.get("released style")
    for v in found.values():
        if base: v["ratio"] = {k: round(v[k]/base[k], 3) for k in ("gflop", "tokens", "seconds", "extra_mib", "live_mib") if base.get(k)}


def limits(found):
    "Name -> (ratio of FLOPs, limit) for what must hold."
    out = {f"{k} to {base}": (found[k]["gflop"]/found[base]["gflop"], limit) for k, (base, limit) in LIMITS.items() if {k, base}<=found.keys()}
    if {"ours, shared, stored", "TRL, exact rDPO"}<=found.keys():
        out["ours, shared, stored to TRL, exact rDPO (compact head)"] = found["ours, shared, stored"]["gflop"]/found["TRL, exact rDPO"]["gflop_compact"], TRL_LIMIT
    return {k: dict(ratio=round(r, 3), limit=limit) for k, (r, limit) in out.items()}


def table(found):
    "The figures as lines of text; ratios to the released style behind them."
    def part(v, key, form): return f"{v[key]:{form}} {v.get('ratio', {}).get(key, np.nan):5.3f}"
    lines = [f"{'':36}{'GFLOP':>8} {'':5}{'tokens':>8} {'':5}{'enc.':>6}{'CPU s':>8} {'':5}{'from-to':>14}{'MiB':>7} {'':5}{'live':>7} {'':5}{'loss':>9}{'|grad|':>10}"]
    for name, v in found.items():
        lines.append(f"{name:36}{part(v, 'gflop', '8.4g')}{part(v, 'tokens', '8')}{v['encodings_per_pair']:6.0f}{part(v, 'seconds', '8.2f')}{v['fastest']:8.2f}-{v['slowest']:<5.2f}"
                     f"{part(v, 'extra_mib', '7')}{part(v, 'live_mib', '7')}" + (f"{v['loss']:9.5f}{v['gradient_norm']:10.5f}" if "loss" in v else ""))
    return "\n".join(lines)


def on_cpu(a):
    "All variants of one geometry, in turn."
    found = {}
    for name in a.only or [*(k for k in VARIANTS if k not in CUDA_ONLY), SCORING]:
        found[name] = condensed(run_child(name, a.geometry[0], a)) | dict(live_mib=run_child(name, a.geometry[0], a, lean=True)["extra_mib"])
        print(f"{name}: {found[name]['seconds']:.2f} s", flush=True)
    agree(found); ratios(found)
    return found


CUDA = [k for k in VARIANTS if k.startswith(("ours", "TRL, exact"))]
CUDA_ONLY = {"TRL, exact rDPO, checkpointing", "ours, flat, stored, checkpointing"}


def on_cuda(a, geometry, rate):
    "Pairs and tokens a second, utilisation and hours of one geometry on the GPU."
    found = {name: run_child(name, geometry, a) for name in a.only or [*CUDA, SCORING]}
    found = {name: v if "error" in v else condensed(v) for name, v in found.items()}
    for v in found.values():
        if "error" not in v:
            s = v["seconds"]
            v |= dict(pairs_per_s=v["pairs"]/s, tokens_per_s=v["tokens"]/s, utilisation=v["gflop"]/1e3/s/rate, hours=PAIRS_OF_THE_PAPER/v["pairs"]*s/3600)
    scored = found.get(SCORING, {}).get("hours")
    for name, v in found.items():
        if "error" in v: print(f"{name:36}{v['error']}"); continue
        if ", stored" in name and scored is not None: v["hours_with_scoring"] = v["hours"]+scored
        print(f"{name:36}{v['pairs_per_s']:8.2f} pairs/s{v['tokens_per_s']:10.0f} tokens/s{100*v['utilisation']:7.1f} % of {rate:.0f} TFLOP/s{v['peak_mib']/1024:8.1f} GiB"
              f"{v['hours']:7.2f} h for {PAIRS_OF_THE_PAPER} pairs" + (f", {v['hours_with_scoring']:.2f} h with scoring" if "hours_with_scoring" in v else ""), flush=True)
    return found


def machine():
    "Hardware and versions."
    cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    gpu = dict(gpu=torch.cuda.get_device_name(), cuda=torch.version.cuda) if torch.cuda.is_available() else {}
    return dict(cpu=cpu, cores=os.cpu_count(), **gpu, load=[round(x, 1) for x in os.getloadavg()], python=platform.python_version(), **{m: version(m) for m in PACKAGES})


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--geometry", nargs="+", choices=GEOMETRY, metavar="NAME", help=f"of {', '.join(GEOMETRY)}; default B on the CPU, both 7B shapes on CUDA")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu"); p.add_argument("--steps", type=int, default=5, help="timed steps")
    p.add_argument("--pairs", type=int, default=2, help="in a step"); p.add_argument("--only", nargs="+", choices=[*VARIANTS, SCORING], metavar="NAME", help="variants to run")
    p.add_argument("--out", type=Path); p.add_argument("--child", help=argparse.SUPPRESS); p.add_argument("--lean", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    if a.device=="cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: --device cuda needs one (80 GB of memory or more for the 7B shapes). Not measured without it: pairs and tokens "
                         "a second, utilisation, GPU memory, hours for 11k pairs. --device cpu measures FLOPs, processor time and memory of a small model.")
    a.geometry = a.geometry or (["B"] if a.device=="cpu" else ["llava-1.5-7b", "llava-next-7b"])
    if a.child: return child(a)
    data = dict(device=a.device, pairs=a.pairs, steps=a.steps, seed=SEED, threads=1 if a.device=="cpu" else os.cpu_count(), dtype="float32" if a.device=="cpu" else "bfloat16", machine=machine())
    if a.device=="cpu":
        found = on_cpu(a)
        data |= dict(geometry=a.geometry[0], **GEOMETRY[a.geometry[0]], limits=limits(found), variants=found, gpu="not measured; see --device cuda")
        print(table(found)); print(json.dumps(data["limits"], indent=1))
    else:
        rate = matmul_rate()
        data |= dict(matmul_tflops=rate, geometries={g: dict(GEOMETRY[g], variants=on_cuda(a, g, rate)) for g in a.geometry})
    name = "train_step.json" if a.device=="cpu" else "train_step_cuda.json"
    out = a.out or Path(__file__).parent/"results"/name
    out.write_text(json.dumps(data, indent=1)+"\n", encoding="utf-8")
    return 0 if a.device!="cpu" else int(any(v["ratio"]>v["limit"] for v in data["limits"].values()))


if __name__ == "__main__": sys.exit(main())
