"""The row layouts: shared = flat = TRL with doubled pairs, on three architectures; and what must break that equality."""
import math
from copy import deepcopy
from functools import cache
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import (CLIPImageProcessorPil, CLIPVisionConfig, JanusConfig, JanusForConditionalGeneration, JanusImageProcessorPil,
                          JanusProcessor, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration,
                          LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil, LlavaNextProcessor,
                          LlavaProcessor, MistralConfig, PreTrainedTokenizerFast, PrinterCallback, Qwen2_5_VLConfig,
                          Qwen2_5_VLForConditionalGeneration)
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
import realign_nb.attention as A
import realign_nb.rows as R
from realign_nb.adapters import lora_config, projector_name
from realign_nb.attention import KIND, share_prefixes
from realign_nb.core import PreferencePair
from realign_nb.dpo import OBJECTIVES, LogpBatch, streams
from realign_nb.models import chat_text, vision_tower
from realign_nb.rows import branch_logps, choose_layout, flat_rows, needed_lengths, row_lengths, shared_rows
from realign_nb.trainer import RDPOConfig, make_trainer, model_card, pair_dataset

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
torch.set_num_threads(1)
SIZE, PATCH, GRID = 28, 14, 4
PINS = [[SIZE, 2*SIZE], [2*SIZE, SIZE], [2*SIZE, 2*SIZE]]
TEMPLATE = ("{% for m in messages %}{% if m['role']=='user' %}<s>USER: {% for p in m['content'] %}"
            "{% if p['type']=='image' %}<image>\n{% else %}{{ p['text'] }}{% endif %}{% endfor %} "
            "{% else %}ASSISTANT: {{ m['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}ASSISTANT: {% endif %}")


# ---- three tiny models with random weights, each with the processor of its family

@cache
def tokenizer():
    "One token per byte, and the special tokens of all three families"
    special = ["<pad>", "<s>", "</s>", "<image>", "<begin_of_image>", "<end_of_image>"]
    tok = Tokenizer(models.BPE({t: i for i, t in enumerate(special+sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left",
        extra_special_tokens=dict(image_token="<image>", boi_token="<begin_of_image>", eoi_token="<end_of_image>"))


LAYERS = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)


def language(kind=LlamaConfig, **kw):
    return kind(**LAYERS, intermediate_size=64, num_key_value_heads=2, vocab_size=len(tokenizer()), max_position_embeddings=512,
                pad_token_id=0, bos_token_id=1, eos_token_id=2, **kw)


def clip(): return CLIPVisionConfig(**LAYERS, intermediate_size=64, image_size=SIZE, patch_size=PATCH, projection_dim=32)


def llava():
    config = LlavaConfig(vision_config=clip(), text_config=language(), image_token_index=3, image_seq_length=GRID)
    images = CLIPImageProcessorPil(size=dict(shortest_edge=SIZE), crop_size=dict(height=SIZE, width=SIZE))
    processor = LlavaProcessor(images, tokenizer(), PATCH, "default", TEMPLATE, num_additional_image_tokens=1)
    return LlavaForConditionalGeneration(config), processor


def llava_next():
    config = LlavaNextConfig(vision_config=clip(), text_config=language(MistralConfig, sliding_window=None), image_token_index=3,
                             image_grid_pinpoints=PINS)
    images = LlavaNextImageProcessorPil(size=dict(shortest_edge=SIZE), crop_size=dict(height=SIZE, width=SIZE), image_grid_pinpoints=PINS)
    processor = LlavaNextProcessor(images, tokenizer(), PATCH, "default", TEMPLATE, num_additional_image_tokens=1)
    return LlavaNextForConditionalGeneration(config), processor


def janus():
    vision = JanusVisionConfig(**LAYERS, image_size=SIZE, patch_size=PATCH, mlp_ratio=2., projection_dim=32, num_image_tokens=GRID, depth=2)
    codes = JanusVQVAEConfig(embed_dim=8, num_embeddings=16, latent_channels=32, base_channels=32, channel_multiplier=[1, 1],
                             num_res_blocks=1, projection_dim=32, image_token_embed_dim=32, num_hidden_layers=2)
    config = JanusConfig(vision_config=vision, vq_config=codes, text_config=language(), image_token_id=3)
    images = JanusImageProcessorPil(size=dict(height=SIZE, width=SIZE), min_size=PATCH)
    return JanusForConditionalGeneration(config), JanusProcessor(images, tokenizer(), TEMPLATE, num_image_tokens=GRID)


FAMILIES = dict(llava=llava, llava_next=llava_next, janus=janus)


@cache
def base(family):
    "The model in eval mode; weights are twice as wide as usual, so that attention is not uniform"
    torch.manual_seed(0)
    model, processor = FAMILIES[family]()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim>1 and "vqmodel" not in name: p.mul_(2.)
    return model.eval(), processor


def shared_base(family):
    model, processor = base(family)
    return share_prefixes(deepcopy(model)), processor


def adapted(family, projector="frozen", dtype=torch.float32, attention="sdpa"):
    "A copy with LoRA of random A and B, and with a projector that has moved away from the base's where it is trained"
    model, processor = base(family)
    model = deepcopy(model).to(dtype)
    model.set_attn_implementation(attention)
    model = get_peft_model(model, lora_config(model, 4, 8, projector)).to(dtype).eval()
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_((.1*torch.randn(p.shape, generator=gen)).to(dtype))
    return model, processor


# ---- pairs: prompts, responses and pictures all differ in length and size

def picture(i):
    gen = torch.Generator().manual_seed(i)
    pixels = torch.randint(0, 256, (6, 6, 3), generator=gen, dtype=torch.uint8).numpy()
    return Image.fromarray(pixels).resize([(60, 30), (30, 60), (56, 56), (40, 28), (28, 64)][i%5], Image.NEAREST)


TEXTS = [("What is it?", "A dog on a red sofa.", "A cat."), ("Count.", "Two.", "There are seven of them here."),
         ("Describe the picture in a word.", "Street", "Stream"), ("Is there a bus?", "No, there is none at all.", "Yes, a bus.")]
PAIRS = [PreferencePair(f"p{i}", x, picture(i), picture(i+1), w, l, "[MASK]") for i, (x, w, l) in enumerate(TEXTS)]
BOTH = dict(flat=flat_rows, shared=shared_rows)


# ---- three ways to the same loss

def fit(model, rows):
    "The kind of attention that rows of this layout want: flat ones transformers' own, so that it is independent of ours"
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    model.set_attn_implementation(dict(text_config=KIND if "segments" in rows else model.config.vision_config._attn_implementation))


def ours(model, rows, objective="rdpo", rule="label"):
    "The loss as the trainer computes it: policy, and reference with the adapter off"
    fit(model, rows)
    with torch.no_grad(), model.disable_adapter(): reference = branch_logps(model, rows, rule)
    return OBJECTIVES[objective](LogpBatch(branch_logps(model, rows, rule), reference, row_lengths(rows))).mean()


def doubled(processor):
    "TRL's rows, made by its own collator: [w|v ; w|v] against [l|v ; w|v_l]"
    collate, eos, n = DataCollatorForVisionPreference(processor), processor.tokenizer.eos_token, len(PAIRS)
    def batch(field):
        return collate([dict(images=[getattr(p, field)], prompt=chat_text(processor, p.prompt),
                             chosen=p.chosen+eos, rejected=p.rejected+eos) for p in PAIRS])
    def wide(x, width): return torch.cat([x, x.new_zeros(len(x), width-x.shape[1], *x.shape[2:])], 1)      # the padding token is 0, too
    def join(a, b):
        a, b = (wide(x, max(a.shape[1], b.shape[1])) for x in (a, b))
        return torch.cat([a[:n], a[:n], a[n:], b[:n]])
    a, b = batch("image"), batch("retrieved_image")
    return {k: join(a[k], b[k]) for k in a if k!="token_type_ids"}


class PlainHead:
    "In place of TRL's fused head, which computes in float32 whatever the model's dtype"
    @staticmethod
    def apply(hidden, weight, bias, targets, *_):
        assert bias is None
        lp = (hidden@weight.T).log_softmax(-1)
        log = torch.zeros_like(targets)                                       # what else it returns is only logged
        return lp.gather(-1, targets[:, None])[:, 0], log, log, log, log.bool()


def trl(tmp_path, family, like, projector):
    "TRL's own loss on doubled pairs with `loss_weights=[2.0]`, and the model that it used"
    config = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, loss_weights=[2.0],
                       remove_unused_columns=False, max_length=None, dataloader_pin_memory=False, report_to="none", disable_tqdm=True)
    model, processor = base(family)
    model = deepcopy(model).to(like.dtype)
    model.set_attn_implementation(like.config.vision_config._attn_implementation)
    t = DPOTrainer(model=model, args=config, train_dataset=pair_dataset(PAIRS), processing_class=processor,
                   peft_config=lora_config(model, 4, 8, projector))
    t.model.to(like.dtype).load_state_dict(like.state_dict())
    rows = doubled(processor); rows["pixel_values"] = rows["pixel_values"].to(like.dtype)
    return t.compute_loss(t.model.eval(), rows), t.model


def gradients(model, loss):
    model.zero_grad(); loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(a, b):
    "Relative L2 distance of two dicts of tensors"
    assert a.keys()==b.keys() and a
    return (sum((a[k]-b[k]).pow(2).sum() for k in a)/sum(b[k].pow(2).sum() for k in b)).sqrt().item()


CASES = [(f, p, d) for f in FAMILIES for p in ("frozen", "full") for d in ("float32", "float64")]


@pytest.mark.parametrize("family,projector,dtype", CASES)
def test_shared_equals_flat_equals_trl(tmp_path, monkeypatch, family, projector, dtype):
    "Ragged pairs, random LoRA B; norms and rotary angles stay float32 inside transformers, and eager attention's softmax does"
    near, close = dict(float32=(2e-5, 1e-5), float64=(1e-8, 1e-6))[dtype]
    if dtype=="float64": monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", PlainHead)
    model, processor = adapted(family, projector, getattr(torch, dtype))
    rows = {k: f(PAIRS, processor) for k, f in BOTH.items()}
    assert len(rows["flat"]["input_ids"])==12 and len(rows["shared"]["input_ids"])==1 and len(rows["shared"]["segments"])==8
    assert len(set(rows["flat"]["attention_mask"].sum(1).tolist()))>6
    loss = {k: ours(model, r) for k, r in rows.items()}
    found = {k: gradients(model, l) for k, l in loss.items()}
    loss["trl"], theirs = trl(tmp_path, family, model, projector)
    found["trl"] = gradients(theirs, loss["trl"])
    assert loss["flat"].dtype==getattr(torch, dtype) and abs(loss["flat"].item()-2*math.log(2))>.002
    assert any(projector_name(model).split(".")[-1] in n for n in found["flat"])==(projector=="full")
    for a, b in (("shared", "flat"), ("shared", "trl"), ("flat", "trl")):
        gap = abs(loss[a].item()/loss[b].item()-1), distance(found[a], found[b])
        assert gap[0]<near and gap[1]<close, (a, b, gap)


# ---- what must break the equality: one patch of the library each

def rejected_sees_chosen(patch):
    patch("segment_attention", lambda q, k, v, segments, scale: right(q, k, v, [(n, sum(more)) for n, *more in segments], scale), A)


def pairs_see_each_other(patch):
    patch("segment_attention", lambda q, k, v, segments, scale: right(q, k, v, [(sum(map(sum, segments)), 0)], scale), A)


right = A.segment_attention


def rejected_not_restarted(patch): patch("_row", lambda p, ys: (whole := ROW(p, ys)) and (whole[0], torch.arange(len(whole[0])), whole[2]))


ROW = R._row


def images_swapped(patch):
    encode, n = R.encode_prompts, len(PAIRS)
    patch("encode_prompts", lambda texts, images, processor: encode(texts, images[n:]+images[:n], processor))


def positions_of_the_longest(patch):
    "The second response starts where the longest prompt of the batch ends, not where its own does"
    def wrong(p, ys):
        ids, positions, places = ROW(p, ys)
        if len(ys)>1: positions[-len(ys[1]):] += 60-len(p)
        return ids, positions, places
    patch("_row", wrong)


def rejected_predicted_by_chosen(patch):
    "The first token of y_l predicted by what stands before it, the end of y_w"
    def wrong(p, ys):
        ids, positions, places = ROW(p, ys)
        if len(ys)>1: places[1][0] = places[1][1]-1
        return ids, positions, places
    patch("_row", wrong)


MUTATIONS = [rejected_sees_chosen, pairs_see_each_other, rejected_not_restarted, images_swapped, positions_of_the_longest,
             rejected_predicted_by_chosen]


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_layout_is_seen(monkeypatch, family, mutation):
    "The tolerances above are 2e-5 and 1e-5; each mistake is far outside of both, in every family"
    model, processor = adapted(family, "full")
    right = ours(model, flat_rows(PAIRS, processor))
    wanted = gradients(model, right)
    def gap():
        loss = ours(model, shared_rows(PAIRS, processor))
        return abs(loss.item()/right.item()-1), distance(gradients(model, loss), wanted)
    loss_gap, gradient_gap = gap()
    assert loss_gap<2e-5 and gradient_gap<1e-5
    mutation(lambda name, f, module=R: monkeypatch.setattr(module, name, f))
    loss_gap, gradient_gap = gap()
    assert loss_gap>1e-4 and gradient_gap>1e-2


# ---- one forward, each image once, only the logits that are needed

@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_forward_and_each_image_once_per_row(family, layout):
    model, processor = adapted(family)
    rows, seen = BOTH[layout](PAIRS, processor), dict(calls=0, images=0, tokens=0, logits=0)
    fit(model, rows)
    inner = model.get_base_model()
    def count(module, name, f):
        module.register_forward_hook(lambda m, args, kw, out: seen.update({name: seen[name]+f(args, kw, out)}), with_kwargs=True)
    count(inner, "calls", lambda *a: 1)
    count(vision_tower(model), "images", lambda args, kw, out: len(args[0] if args else kw["pixel_values"]))
    count(inner.model.language_model, "tokens", lambda args, kw, out: out[0].shape[:2].numel())
    count(inner.lm_head, "logits", lambda args, kw, out: out.shape[:-1].numel())
    with torch.no_grad(): branch_logps(model, rows)
    images = [p.image for p in PAIRS]*(1 if layout=="shared" else 2)+[p.retrieved_image for p in PAIRS]
    def tiles_of(im): return len(processor.image_processor(images=[im], return_tensors="pt")["pixel_values"][0])
    tiles = sum(map(tiles_of, images)) if family=="llava_next" else len(images)
    lengths = sum(v.sum().item() for v in row_lengths(rows).values())
    assert seen==dict(calls=1, images=tiles, tokens=rows["input_ids"].numel(), logits=lengths-(len(PAIRS) if layout=="shared" else 0))


def test_models_that_take_less_than_a_mask_of_places():
    "A common index for all rows (transformers before 5.23), or no `logits_to_keep`: the same log-probs"
    model, processor = shared_base("llava")
    kept = []
    class Old(torch.nn.Module):
        dtype, config = model.dtype, model.config
        def forward(self, logits_to_keep=0, **kw):
            kept.append(logits_to_keep)
            return model(logits_to_keep=logits_to_keep, **kw)
    class Plain(Old):
        def forward(self, input_ids, pixel_values, attention_mask, position_ids=None, use_cache=None):
            return model(input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask, position_ids=position_ids)
    with torch.no_grad():
        for f in BOTH.values():
            rows = f(PAIRS, processor)
            wanted = branch_logps(model, rows)
            for other in (Old(), Plain()) if f is flat_rows else (Plain(),):
                found = branch_logps(other, rows)
                for s in wanted: assert found[s].tolist()==pytest.approx(wanted[s].tolist(), rel=1e-6)
            images = [p.image for p in PAIRS]+[p.retrieved_image for p in PAIRS]
            shortest = min(map(len, R.encode_prompts([p.prompt for p in PAIRS]*2, images, processor)[0]))
            if f is flat_rows: assert kept[-1].ndim==1 and kept[-1].min()==shortest-1 and len(kept[-1])<rows["input_ids"].shape[1]


# ---- objectives, rules, padding

@pytest.mark.parametrize("rule", ["label", "top1_nonlabel"])
@pytest.mark.parametrize("objective", ["dpo", "vdpo", "rdpo", "sft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_objective_and_rule_agrees(family, objective, rule):
    "dpo needs rows of the first image only; vdpo and sft have nothing to share"
    model, processor = adapted(family)
    names = streams(objective)
    rows = {k: f(PAIRS, processor, streams=names) for k, f in BOTH.items()}
    assert len(rows["shared"]["segments"])==4*len({"@" in s for s in names})
    share_prefixes(model)
    logps = {k: branch_logps(model, r, rule) for k, r in rows.items()}
    assert list(logps["shared"])==list(names)
    for s in names: assert logps["shared"][s].tolist()==pytest.approx(logps["flat"][s].tolist(), rel=1e-5)
    losses = [ours(model, r, objective, rule).item() for r in rows.values()]
    assert losses[0]==pytest.approx(losses[1], rel=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_and_order_change_nothing(family):
    model, processor = shared_base(family)
    with torch.no_grad():
        whole, turned = (branch_logps(model, shared_rows(p, processor)) for p in (PAIRS, PAIRS[::-1]))
        alone = [branch_logps(model, shared_rows([p], processor)) for p in PAIRS]
    for s in whole:
        assert whole[s].tolist()==pytest.approx([a[s].item() for a in alone], rel=1e-5)
        assert whole[s].tolist()==pytest.approx(turned[s].flip(0).tolist(), rel=1e-5)


def test_views_and_given_images():
    "Another second image changes the third stream only; images can be given; errors are those of flat rows"
    model, processor = shared_base("llava")
    with torch.no_grad():
        one, blank = (branch_logps(model, shared_rows(PAIRS, processor, view)) for view in ("retrieved", "blank"))
        given = branch_logps(model, shared_rows(PAIRS, processor, images=[p.image for p in PAIRS]))
    assert list(blank)==["w", "l", "w@blank"] and torch.allclose(one["w"], blank["w"]) and torch.allclose(one["l"], blank["l"])
    assert (one["w@retrieved"]-blank["w@blank"]).abs().min()>1e-4 and torch.allclose(given["w"], given["w@retrieved"])
    empty = PreferencePair("p9", "x", picture(0), picture(1), "a", " ", "[MASK]")
    for f in BOTH.values():
        with pytest.raises(ValueError, match="record p9: its rejected response is empty"): f([empty], processor)
        with pytest.raises(ValueError, match="2 images of view 'retrieved' for 4 pairs"): f(PAIRS, processor, images=[picture(0)]*2)
        with pytest.raises(R.TooLong, match="record p0 needs"): f(PAIRS, processor, max_length=30)


def test_a_row_may_be_longer_than_the_model_holds():
    "Positions start again, so what counts is the prompt with its longer response: as in flat rows"
    model, processor = base("llava")
    needed = needed_lengths(PAIRS, processor)
    rows = shared_rows(PAIRS, processor, max_length=max(needed.values()))
    longest = [n+sum(more) for n, *more in rows["segments"]]
    assert max(longest)>max(needed.values())==rows["position_ids"].max()+1


def test_checkpointing_changes_nothing():
    model, processor = adapted("llava", "full")
    rows = shared_rows(PAIRS, processor)
    a = gradients(model, ours(model, rows))
    model.enable_input_require_grads(); model.gradient_checkpointing_enable(); model.train()
    calls = []
    model.get_base_model().model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *a: calls.append(1))
    b = gradients(model, ours(model, rows))
    assert len(calls)==3 and distance(a, b)<1e-6                                           # reference, policy, and policy again


# ---- the choice

def on_meta(build):
    with torch.device("meta"): return build()


def qwen():
    text = dict(**LAYERS, intermediate_size=64, num_key_value_heads=2, vocab_size=300, bos_token_id=1, eos_token_id=2,
                rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2]))
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=dict(depth=1, hidden_size=32, num_heads=4,
                                                                                                   out_hidden_size=32)))


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_shares_where_it_may(family):
    model, processor = adapted(family)
    layout, why = choose_layout(model, longest=max(needed_lengths(PAIRS, processor).values()))
    assert layout=="shared" and type(model.get_base_model()).__name__ in why
    assert choose_layout(model, "flat")==("flat", "flat rows were asked for")


def window(n):
    model = deepcopy(base("llava_next")[0])
    model.config.text_config.sliding_window = n
    return model


def set_to(**kw):
    model = deepcopy(base("llava")[0])
    for k, v in kw.items(): setattr(model.config.text_config, k, v)
    return model


REFUSED = dict(three_axes=(lambda: on_meta(qwen), "three axes"),
               flash=(lambda: set_to(_attn_implementation="flash_attention_2"), "flash_attention_2 attention was chosen"),
               window=(lambda: window(40), "sliding window of 40 tokens is shorter than the longest row .41 tokens"),
               recurrent=(lambda: set_to(layer_types=["linear_attention", "full_attention"]), "layers of kind linear_attention"),
               learned=(lambda: set_to(rope_parameters=None), "not rotary"))


@pytest.mark.parametrize("case", REFUSED)
def test_auto_is_flat_and_says_why(case):
    build, reason = REFUSED[case]
    model = build()
    layout, why = choose_layout(model, longest=41)
    assert layout=="flat" and why.startswith(type(model).__name__)
    with pytest.raises(ValueError, match=f"cannot take shared rows: .*{reason}.*; use layout='flat' or 'auto'"):
        choose_layout(model, "shared", 41)
    with pytest.raises(ValueError, match="layout='packed' is unknown"): choose_layout(model, "packed")


def test_a_long_window_is_no_obstacle():
    assert choose_layout(window(41), longest=41)[0]=="shared"
    layout, why = choose_layout(window(41))                                                # not known to be long enough
    assert layout=="flat" and why.endswith("the longest row (unknown tokens)")
    for kind, wanted in (("full_attention", "shared"), ("sliding_attention", "flat")):    # a window that no layer uses
        assert choose_layout(set_to(sliding_window=20, layer_types=[kind]*2), longest=41)[0]==wanted


def test_a_window_does_change_the_numbers():
    "Why a short window is refused: the model's own mask would cut what segments show"
    model, processor = window(20), base("llava_next")[1]
    found = []
    for f in BOTH.values():
        fit(model, rows := f(PAIRS, processor))
        with torch.no_grad(): found.append(branch_logps(model, rows)["w"])
    a, b = found
    assert (a-b).abs().max()>1e-3


def test_a_model_that_cannot_see_segments_is_refused():
    model, processor = base("llava")
    with pytest.raises(ValueError, match="the model has sdpa; call attention.share_prefixes"):
        branch_logps(model, shared_rows(PAIRS, processor))


def test_a_switched_model_generates_as_before():
    "With padding on the left and a cache"
    model, processor = base("llava_next")
    other = share_prefixes(deepcopy(model))
    x = processor(text=[chat_text(processor, p.prompt) for p in PAIRS], images=[[p.image] for p in PAIRS], padding=True, return_tensors="pt")
    a, b = (m.generate(**x, max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (model, other))
    assert a.tolist()==b.tolist()


# ---- in the trainer

def test_the_trainer_shares_by_itself(tmp_path):
    "Three steps in both layouts change the adapter alike; the card names the layout"
    ends = []
    for layout in ("auto", "flat"):
        model, processor = base("llava_next")
        config = RDPOConfig(output_dir=str(tmp_path/layout), use_cpu=True, layout=layout, projector="full", lora_r=4, lora_alpha=8, optim="sgd",
                            learning_rate=.1, projector_learning_rate=.1, per_device_train_batch_size=2, gradient_accumulation_steps=1,
                            max_steps=3, save_strategy="no", disable_tqdm=True)
        t = make_trainer(deepcopy(model), processor, PAIRS, config)
        t.remove_callback(PrinterCallback)
        assert (t.args.layout, config.layout)==(dict(auto="shared").get(layout, layout), layout)
        with torch.no_grad():
            for i, (n, p) in enumerate(t.model.named_parameters()):
                if "lora_B" in n: p.add_(.1*torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        before = {n: p.detach().clone() for n, p in t.model.named_parameters() if p.requires_grad}
        t.train()
        ends.append({n: p.detach()-before[n] for n, p in t.model.named_parameters() if p.requires_grad})
        assert ("attends by segments" in t.layout_reason)==(layout=="auto")
        assert f"| layout | {t.args.layout} |" in model_card(t)
    assert distance(*ends)<1e-4                                                            # float32 differences of weights


def test_sharing_saves_more_than_a_quarter():
    "Operations of one forward with all attention counted, causal calls as full squares"
    long = [PreferencePair("p", "a"*300, picture(0), picture(1), "b"*60, "c"*60, "[MASK]")]
    fused, work = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, **kw: sdpa_flop_count(q, k, v)}, {}
    model, processor = shared_base("llava")
    for k, f in BOTH.items():
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=fused) as count: branch_logps(model, f(long, processor))
        work[k] = count.get_total_flops()
    assert .65<work["shared"]/work["flat"]<.74
