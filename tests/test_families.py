"""Every family on a tiny random model of its own class, with a processor of its own class and the template of its checkpoints."""
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
import torch
import trl
from peft import get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (CLIPImageProcessorPil, CLIPVisionConfig, Idefics3Config, Idefics3ForConditionalGeneration,
                          Idefics3ImageProcessorPil, Idefics3Processor, JanusConfig, JanusForConditionalGeneration,
                          JanusImageProcessorPil, JanusProcessor, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig, LlavaConfig,
                          LlavaForConditionalGeneration, LlavaNextConfig, LlavaNextForConditionalGeneration,
                          LlavaNextImageProcessorPil, LlavaNextProcessor, LlavaProcessor, MistralConfig, PreTrainedTokenizerFast,
                          PrinterCallback, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor,
                          Qwen2VLImageProcessorPil, SmolVLMConfig, SmolVLMForConditionalGeneration)
import realign_nb.models as M
from realign_nb.adapters import LINEARS, lora_config
from realign_nb.attention import share_prefixes
from realign_nb.core import PreferencePair
from realign_nb.families import (FAMILIES, answer_logps, check, count_image_tokens, describe, family_of, family_table, lora_targets,
                                 template_facts)
from realign_nb.models import HFVLM, chat_text, load_vlm, vision_tower
from realign_nb.rows import branch_logps, encode_prompts, flat_rows, response_ids, row_lengths, shared_rows
from realign_nb.tinyvlm import build, tiny_vlm
from realign_nb.trainer import RDPOConfig, make_trainer
from realign_nb.world import DESCRIBE, caption, draw, make_scenes
from test_rows import PAIRS, picture

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

torch.set_num_threads(1)
SIZE, PATCH, GRID = 28, 14, 4
PINS = [[SIZE, 2*SIZE], [2*SIZE, SIZE], [2*SIZE, 2*SIZE]]


# ---- templates: what the checkpoints on the hub write (trl carries four of them word for word)

SHIPPED = Path(trl.__file__).parent/"chat_templates"
VICUNA = ("{% for m in messages %}{% if m['role']!='system' %}{{ m['role'].upper()+': ' }}{% endif %}"
          "{% for c in m['content'] if c['type']=='image' %}{{ '<image>\n' }}{% endfor %}"
          "{% for c in m['content'] if c['type']=='text' %}{{ c['text']+' ' }}{% endfor %}{% endfor %}"
          "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
JANUS = ("{% for m in messages %}{{ '<|User|>: ' if m['role']=='user' else '<|Assistant|>: ' }}"
         "{% for c in m['content'] %}{% if c['type']=='image' %}{{ '<image_placeholder>' }}{% if not loop.last %}{{ '\n' }}{% endif %}"
         "{% else %}{{ c['text'].rstrip() if loop.last else c['text'] }}{% endif %}{% endfor %}"
         "{% if not loop.last or add_generation_prompt %}{{ '\n\n' if m['role']=='user' else eos_token }}{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|Assistant|>:' }}{% endif %}")


@cache
def tokenizer(specials, bos, eos, pad, **named):
    "One token per byte, and the special tokens of a family; `bos` in front of every text, as in the Llama tokenizers"
    tok = Tokenizer(models.BPE({t: i for i, t in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}, []))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    if bos: tok.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, specials.index(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token=pad, bos_token=bos, eos_token=eos, padding_side="left",
                                   extra_special_tokens=named)


def llama_tokenizer(): return tokenizer(("<pad>", "<s>", "</s>", "<image>"), "<s>", "</s>", "<pad>", image_token="<image>")


LAYERS = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)


def language(tok, kind=LlamaConfig, **kw):
    return kind(**LAYERS, intermediate_size=64, num_key_value_heads=2, vocab_size=len(tok), max_position_embeddings=512,
                pad_token_id=tok.pad_token_id, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, **kw)


def clip(): return CLIPVisionConfig(**LAYERS, intermediate_size=64, image_size=SIZE, patch_size=PATCH, projection_dim=32)


def llava():
    tok = llama_tokenizer()
    config = LlavaConfig(vision_config=clip(), text_config=language(tok), image_token_index=tok.image_token_id, image_seq_length=GRID)
    images = CLIPImageProcessorPil(size=dict(shortest_edge=SIZE), crop_size=dict(height=SIZE, width=SIZE))
    return LlavaForConditionalGeneration(config), LlavaProcessor(images, tok, PATCH, "default", VICUNA, num_additional_image_tokens=1)


def llava_next(kind=LlamaConfig, template=VICUNA, **kw):
    tok = llama_tokenizer()
    config = LlavaNextConfig(vision_config=clip(), text_config=language(tok, kind, **kw), image_token_index=tok.image_token_id,
                             image_grid_pinpoints=PINS)
    images = LlavaNextImageProcessorPil(size=dict(shortest_edge=SIZE), crop_size=dict(height=SIZE, width=SIZE), image_grid_pinpoints=PINS)
    return LlavaNextForConditionalGeneration(config), LlavaNextProcessor(images, tok, PATCH, "default", template, num_additional_image_tokens=1)


def llava_next_mistral(): return llava_next(MistralConfig, (SHIPPED/"llava_next.jinja").read_text(), sliding_window=None)


def janus():
    bos, eos, pad = (f"<｜{w}｜>" for w in ("begin▁of▁sentence", "end▁of▁sentence", "▁pad▁"))
    names = dict(image_token="<image_placeholder>", boi_token="<begin_of_image>", eoi_token="<end_of_image>")
    tok = tokenizer((pad, bos, eos, *names.values()), bos, eos, pad, **names)
    vision = JanusVisionConfig(**LAYERS, image_size=SIZE, patch_size=PATCH, mlp_ratio=2., projection_dim=32, num_image_tokens=GRID, depth=2)
    codes = JanusVQVAEConfig(embed_dim=8, num_embeddings=16, latent_channels=32, base_channels=32, channel_multiplier=[1, 1],
                             num_res_blocks=1, projection_dim=32, image_token_embed_dim=32, num_hidden_layers=2)
    config = JanusConfig(vision_config=vision, vq_config=codes, text_config=language(tok), image_token_id=tok.image_token_id)
    images = JanusImageProcessorPil(size=dict(height=SIZE, width=SIZE), min_size=PATCH)
    return JanusForConditionalGeneration(config), JanusProcessor(images, tok, JANUS, use_default_system_prompt=True, num_image_tokens=GRID)


class QwenImages(Qwen2_5_VLProcessor):
    "The processor of Qwen2.5-VL without its video half, which needs torchvision"
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        super(Qwen2_5_VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)


def qwen():
    tok = tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
                    None, "<|im_end|>", "<|endoftext|>")
    ids = dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"), range(3, 7)))
    text = language(tok, dict, rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=10000.))
    config = Qwen2_5_VLConfig(text_config=text, **ids, vision_config=dict(depth=2, hidden_size=32, num_heads=4, intermediate_size=64,
                                                                          out_hidden_size=32, fullatt_block_indexes=[1]))
    images = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, min_pixels=SIZE**2, max_pixels=16*SIZE**2)
    return Qwen2_5_VLForConditionalGeneration(config), QwenImages(images, tok, (SHIPPED/"qwen2_5_vl.jinja").read_text())


def idefics(config=Idefics3Config, model=Idefics3ForConditionalGeneration):
    "SmolVLM is this class; SmolVLM2 is a class of its own whose processor does the same with images"
    places = [f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5)]
    names = dict(image_token="<image>", fake_image_token="<fake_token_around_image>", global_image_token="<global-img>",
                 end_of_utterance_token="<end_of_utterance>")
    tok = tokenizer(("<pad>", "<|im_start|>", *names.values(), *places), "<|im_start|>", "<end_of_utterance>", "<pad>", **names)
    vision = dict(**LAYERS, intermediate_size=64, image_size=SIZE, patch_size=7)
    config = config(vision_config=vision, text_config=language(tok), image_token_id=tok.image_token_id, scale_factor=2, pad_token_id=tok.pad_token_id)
    images = Idefics3ImageProcessorPil(size=dict(longest_edge=2*SIZE), max_image_size=dict(longest_edge=SIZE))
    return model(config), Idefics3Processor(images, tok, image_seq_len=GRID, chat_template=(SHIPPED/"smolvlm.jinja").read_text())


def smolvlm2(): return idefics(SmolVLMConfig, SmolVLMForConditionalGeneration)


BUILDERS = {"llava-1.5": llava, "llava-1.6-mistral": llava_next_mistral, "llava-1.6-vicuna": llava_next, "janus-pro": janus,
            "qwen2.5-vl": qwen, "smolvlm": idefics, "smolvlm2": smolvlm2}


@cache
def base(family):
    "The model in eval mode; weights are twice as wide as usual, so that attention is not uniform"
    torch.manual_seed(0)
    model, processor = BUILDERS[family]()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim>1 and "vqmodel" not in name: p.mul_(2.)
    return model.eval(), processor


def words(text): return [dict(type="text", text=text)]


def encoded(processor, image, prompt, answer=None):
    "Token ids by the processor's own `apply_chat_template`, images and all"
    messages = [dict(role="user", content=[dict(type="image", image=image), *words(prompt)])]
    if answer: messages.append(dict(role="assistant", content=words(answer)))
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt",
                                         add_generation_prompt=not answer)["input_ids"][0].tolist()


# ---- the table against models and processors

def test_every_family_has_a_model():
    assert BUILDERS.keys()==FAMILIES.keys()==set(family_table().index)
    assert family_of(SimpleNamespace(config=LlamaConfig())) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_what_the_model_says(family):
    model, processor = base(family)
    row, found = FAMILIES[family], describe(model, processor)
    assert found["family"]==family and found["auto"]
    for key in ("model", "vision", "projector", "language", "layout", "prompt", "answer", "eos"): assert found[key]==getattr(row, key), key
    assert found["stops"]==(row.eos in row.answer)==(family not in ("llava-1.5", "llava-1.6-vicuna", "janus-pro"))
    assert model.get_submodule(row.vision) is vision_tower(model)


@pytest.mark.parametrize("targets", LINEARS)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_goes_to_the_language_model_only(family, targets):
    "Every linear of the seven (or four) names in both layers, none of the tower's or the projector's"
    model, _ = base(family)
    assert lora_targets(model, targets)=={n: 2 for n in LINEARS[targets]}
    wrapped = get_peft_model(deepcopy(model), lora_config(model, 4, 8, "full", targets))
    trained = {n.removeprefix("base_model.model.") for n, p in wrapped.named_parameters() if p.requires_grad}
    inside = {n for n in trained if n.startswith(FAMILIES[family].language+".")}
    assert len(inside)==2*2*len(LINEARS[targets]) and all("lora_" in n for n in inside)
    assert trained-inside and all(n.startswith(FAMILIES[family].projector+".") for n in trained-inside)


# ---- templates and the end of an answer

@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_the_template(family):
    "The prompt is what the processor itself makes of the conversation, the answer follows it, and one EOS is scored at the end"
    model, processor = base(family)
    tok, eos = processor.tokenizer, processor.tokenizer.eos_token_id
    rows = flat_rows(PAIRS, processor, streams=("w", "l"))
    for r, (p, answer) in enumerate([(p, p.chosen) for p in PAIRS]+[(p, p.rejected) for p in PAIRS]):
        ids = rows["input_ids"][r][rows["attention_mask"][r].bool()].tolist()
        scored = rows["labels"][r][rows["labels"][r]!=-100].tolist()
        prompt = encoded(processor, p.image, p.prompt)
        assert ids==prompt+scored
        assert scored.count(eos)==1 and scored[-1]==eos and tok.decode(scored[:-1]).strip()==answer
        whole = encoded(processor, p.image, p.prompt, answer)            # ends in EOS and white space, in white space, or in nothing
        assert whole[:len(ids)]==ids if FAMILIES[family].eos in FAMILIES[family].answer else whole[:len(ids)-1]==ids[:-1]
        assert tok.decode([i for i in whole[len(ids)-1:] if i!=eos]).strip()==""


def test_vicuna_and_mistral_differ():
    x, y = "Is it red?", "Yes."
    vicuna, mistral = (base(f)[1] for f in ("llava-1.6-vicuna", "llava-1.6-mistral"))
    assert chat_text(vicuna, x)=="USER: <image>\nIs it red? ASSISTANT:" and chat_text(mistral, x)=="[INST] <image>\nIs it red? [/INST]"
    assert chat_text(vicuna, x, y)=="USER: <image>\nIs it red? ASSISTANT: Yes. " and chat_text(mistral, x, y)=="[INST] <image>\nIs it red? [/INST] Yes.</s> "
    a, b = (response_ids(p, x, y) for p in (vicuna, mistral))
    assert a==b and vicuna.tokenizer.decode(a)==" Yes.</s>"


def test_an_older_mistral_template_gets_its_eos():
    "Until July 2024 the template on the hub ended an answer in something that is not the token"
    processor = deepcopy(base("llava-1.6-mistral")[1])
    wanted = response_ids(processor, "x", "y")
    processor.chat_template = processor.chat_template.replace("</s>", "<\\\\s>")
    assert chat_text(processor, "x", "y").endswith("y<\\s> ") and response_ids(processor, "x", "y")==wanted
    assert not template_facts(processor)["stops"]


def test_janus_has_its_system_sentence():
    _, processor = base("janus-pro")
    text = processor.tokenizer.decode(encode_prompts(["Hi"], [picture(0)], processor)[0][0])
    assert text.count("You are a helpful language and vision assistant.")==1 and text.startswith("<｜begin▁of▁sentence｜>")
    assert text.endswith("<end_of_image>\nHi\n\n<|Assistant|>:") and text.count("<image_placeholder>")==GRID


# ---- image tokens, with image processors as large as the real ones

def full_size(family):
    "The tiny processor with the image half of the checkpoints"
    processor = deepcopy(base(family)[1])
    if family=="llava-1.5":
        processor.image_processor = CLIPImageProcessorPil(size=dict(shortest_edge=336), crop_size=dict(height=336, width=336))
    if family.startswith("llava-1.6"):
        pins = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        processor.image_processor = LlavaNextImageProcessorPil(size=dict(shortest_edge=336), crop_size=dict(height=336, width=336),
                                                               image_grid_pinpoints=pins)
    if family=="janus-pro":
        processor.image_processor, processor.num_image_tokens = JanusImageProcessorPil(size=dict(height=384, width=384)), 576
    if family=="qwen2.5-vl": processor.image_processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, min_pixels=3136, max_pixels=12845056)
    if family.startswith("smolvlm"):
        processor.image_processor = Idefics3ImageProcessorPil(size=dict(longest_edge=1536), max_image_size=dict(longest_edge=384))
        processor.image_seq_len = 81
    return processor


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("llava-1.6-vicuna", "smolvlm2")])   # as mistral, as smolvlm
def test_image_tokens_are_the_processors(family):
    processor = full_size(family)
    for size in [(640, 480), (375, 500), (1000, 210), (97, 301), (336, 336)]:
        assert FAMILIES[family].tokens(*size)==count_image_tokens(processor, *size), size


# ---- f_v

@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_of_one_picture_each(family):
    "In a batch as alone, whole pictures, and different ones differ"
    model, processor = base(family)
    vlm, images = HFVLM(model, processor), [picture(i) for i in range(3)]
    together, alone = vlm.embed(images), np.concatenate([vlm.embed([im]) for im in images])
    assert together.shape==(3, 32) and np.allclose(together, alone, atol=1e-5)
    assert all(np.abs(together[i]-together[j]).max()>1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))
    if family.startswith("smolvlm"):                # the last of the tiles is the whole picture
        tiles = processor.image_processor(images=[[images[2]]], return_tensors="pt")["pixel_values"]
        with torch.no_grad(): whole = vision_tower(model)(tiles[:, -1]).last_hidden_state.mean(1)
        assert np.allclose(together[2], whole[0], atol=1e-5)


# ---- scoring and training

@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_do_not_depend_on_neighbours(family):
    model, processor = base(family)
    with torch.no_grad(): whole, alone = branch_logps(model, flat_rows(PAIRS, processor)), [branch_logps(model, flat_rows([p], processor)) for p in PAIRS]
    for s in whole: assert whole[s].tolist()==pytest.approx([a[s].item() for a in alone], rel=1e-5)
    assert (whole["w"]-whole["w@retrieved"]).abs().min()>1e-4


@pytest.mark.parametrize("family", [f for f in FAMILIES if FAMILIES[f].layout=="shared"])
def test_both_layouts_agree(family):
    model, processor = base(family)
    shared = deepcopy(model); share_prefixes(shared)
    with torch.no_grad(): a, b = branch_logps(model, flat_rows(PAIRS, processor)), branch_logps(shared, shared_rows(PAIRS, processor))
    for s in a: assert b[s].tolist()==pytest.approx(a[s].tolist(), rel=1e-5)


def test_qwen_positions_are_those_of_the_model():
    "transformers' own loss over the conversation, which gets `mm_token_type_ids` from the processor; without them another number"
    model, processor = base("qwen2.5-vl")
    pair = replace(PAIRS[0], image=picture(2).resize((112, 112)))               # sixteen tokens, four positions wide
    enc = processor(text=[chat_text(processor, pair.prompt, pair.chosen).rstrip()], images=[[pair.image]], return_tensors="pt")
    rows = flat_rows([pair], processor, streams=("w",))
    assert enc["input_ids"].tolist()==rows["input_ids"].tolist()
    n = row_lengths(rows)["w"].item()
    labels = enc["input_ids"].clone(); labels[:, :-n] = -100
    with torch.no_grad():
        assert branch_logps(model, rows)["w"].item()==pytest.approx(-n*model(**enc, labels=labels).loss.item(), rel=1e-5)
        flat = branch_logps(model, {k: v for k, v in rows.items() if k!="mm_token_type_ids"})["w"].item()
    assert abs(flat-branch_logps(model, rows)["w"].item())>1e-3


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_one_training_step(tmp_path, family):
    "Through `make_trainer`: the layout of the table, adapter and projector change and nothing else; `check` on what was saved"
    model, processor = base(family)
    config = RDPOConfig(output_dir=str(tmp_path), use_cpu=True, projector="full", lora_r=4, lora_alpha=8, learning_rate=1e-2, warmup_steps=0,
                        projector_learning_rate=1e-2, per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=2,
                        save_strategy="no", disable_tqdm=True)
    t = make_trainer(deepcopy(model), processor, PAIRS, config)
    t.remove_callback(PrinterCallback)
    assert t.args.layout==FAMILIES[family].layout
    before = {n: p.detach().clone() for n, p in t.model.named_parameters()}
    t.train()
    changed = {n for n, p in t.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed=={n for n, p in t.model.named_parameters() if p.requires_grad}
    report = check(t.model, processor, PAIRS)
    assert [r["ok"] for r in report.rows[2:]]==[True, True] and report.rows[3]["nats"]==0


# ---- check

@cache
def trained(): return tiny_vlm()


def world_pairs(n):
    rng, scenes = np.random.default_rng(0), make_scenes(n, "eval", seed=9)
    pictures, texts = [draw(s) for s in scenes], [caption(s, rng) for s in scenes]
    return [PreferencePair(f"p{i}", DESCRIBE, pictures[i], pictures[i-1], texts[i], texts[i-1], "[MASK]") for i in range(n)]


def test_check_sees_a_used_image_and_a_dead_projector():
    model, processor = trained()
    pairs = world_pairs(16)
    report = check(model, processor, pairs)
    assert report.ok and len(report.rows)==2 and all(r["n"]==r["pictures"]==16 and 0<r["low"]<r["nats"]<r["high"] for r in report.rows)
    assert report.verdict=="all as it should be" and report.verdict in report._repr_html_()
    dead = deepcopy(model)
    with torch.no_grad():
        for p in dead.get_submodule(FAMILIES["llava-1.5"].projector).parameters(): p.zero_()
    report = check(dead, processor, pairs)
    assert not report.ok and [r["nats"] for r in report.rows]==[0, 0] and "blank" in report.verdict
    assert not check(build(seed=0)[0], processor, pairs).ok


def test_check_is_by_picture_and_repeats():
    "Two answers to each picture: half as many independent values; the same numbers each time; swapping the roles turns the sign"
    model, processor = trained()
    pairs = world_pairs(8)
    twice = pairs+[replace(p, id=p.id+"b", chosen=p.chosen+" It is here.") for p in pairs]
    a, b = check(model, processor, twice), check(model, processor, twice)
    assert a.rows==b.rows and all((r["n"], r["pictures"])==(16, 8) for r in a.rows)
    wrong = [replace(p, image=p.retrieved_image, retrieved_image=p.image) for p in pairs]     # answers about another picture
    gain = answer_logps(model, processor, pairs)-answer_logps(model, processor, wrong)
    assert gain.mean()>.5 and not check(model, processor, wrong).ok


def adapted(model, seed=0, **kw):
    config = lora_config(model, 4, 8, "full", **kw)
    config.init_lora_weights = False
    torch.manual_seed(seed)
    out = get_peft_model(deepcopy(model), config)
    with torch.no_grad():                                         # the trained copy of the projector moves too
        for n, p in out.named_parameters():
            if p.requires_grad and "lora_" not in n: p.mul_(1.1)
    return out


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_check_of_an_adapter_in_memory_and_from_its_folder(tmp_path):
    model, processor = trained()
    pairs, other = world_pairs(6), adapted(model, seed=1)
    one = adapted(model)
    one.train(); flags = {n: p.requires_grad for n, p in one.named_parameters()}
    before = {n: p.detach().clone() for n, p in one.named_parameters()}
    assert [r["ok"] for r in check(one, processor, pairs).rows[2:]]==[True, True]
    one.save_pretrained(tmp_path/"one"); other.save_pretrained(tmp_path/"other")
    assert [r["ok"] for r in check(one, processor, pairs, tmp_path/"one").rows[2:]]==[True, True]
    assert [r["ok"] for r in check(one, processor, pairs, tmp_path/"other").rows[2:]]==[True, False]    # the folder of another run
    assert one.training and one.active_adapter=="default" and list(one.peft_config)==["default"]
    after = dict(one.named_parameters())                          # the model is as it was
    assert {n: p.requires_grad for n, p in after.items()}==flags and all(torch.equal(after[n], before[n]) for n in before)
    bare = deepcopy(model)
    alone = answer_logps(bare, processor, pairs)
    report = check(bare, processor, pairs, tmp_path/"one")
    assert len(report.rows)==3 and report.rows[2]["ok"]
    assert np.array_equal(answer_logps(bare, processor, pairs), alone) and not hasattr(bare, "peft_config")
    assert [n for n, _ in bare.named_parameters()]==[n for n, _ in model.named_parameters()]


# ---- four bits

def test_four_bits_need_bitsandbytes(monkeypatch):
    monkeypatch.setattr(M, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package bitsandbytes: pip install bitsandbytes"): load_vlm("tiny", device="cpu", quantize="4bit")
    with pytest.raises(ValueError, match="quantize='8bit' is unknown; use '4bit'"): load_vlm("tiny", quantize="8bit")
    with pytest.raises(ValueError, match="only a local model"): load_vlm("server:m", quantize="4bit")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_training_on_a_four_bit_base(tmp_path):
    "Only the language model is in four bits; gradients are those of the same weights in bfloat16, also after answering in eval mode"
    bnb = pytest.importorskip("bitsandbytes")
    vlm, pairs = load_vlm("tiny", device="cpu", quantize="4bit"), world_pairs(6)
    model = vlm.model
    packed = {n for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(packed)==21 and all(n.startswith("model.language_model.") for n in packed)
    assert all(model.get_submodule(n).weight.dtype==torch.uint8 for n in packed) and model.lm_head.weight.dtype==torch.bfloat16
    assert vlm.generate([DESCRIBE], [pairs[0].image], 4) and vlm.spec["quantize"]=="4bit"
    config = RDPOConfig(output_dir=str(tmp_path), use_cpu=True, projector="full", lora_r=4, lora_alpha=8, learning_rate=1e-2, warmup_steps=0,
                        projector_learning_rate=1e-2, per_device_train_batch_size=6, gradient_accumulation_steps=1, max_steps=2,
                        save_strategy="no", disable_tqdm=True)
    t = make_trainer(model, vlm.processor, pairs, config)
    t.remove_callback(PrinterCallback)
    before = {n: p.detach().clone() for n, p in t.model.named_parameters()}
    t.train()
    changed = {n for n, p in t.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed=={n for n, p in t.model.named_parameters() if p.requires_grad} and len(changed)==42+4
    found = gradients(t.model, vlm.processor, pairs)
    for n in packed:
        lora, layer = t.model.get_submodule("base_model.model."+n), torch.nn.Linear(1, 1, bias=False)
        weight = lora.base_layer.weight
        layer.weight = torch.nn.Parameter(bnb.functional.dequantize_4bit(weight.data, weight.quant_state).to(torch.bfloat16), False)
        lora.base_layer = layer
    wanted = gradients(t.model, vlm.processor, pairs)
    assert found.keys()==wanted.keys()==changed
    gap = (sum((found[n]-wanted[n]).pow(2).sum() for n in found)/sum(w.pow(2).sum() for w in wanted.values())).sqrt()
    assert gap<.05


def gradients(model, processor, pairs):
    model.zero_grad()
    branch_logps(model, flat_rows(pairs, processor, streams=("w",)))["w"].sum().backward()
    return {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
