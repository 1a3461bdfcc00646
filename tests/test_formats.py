"""Instructions from outside, and pairs for other trainers: nothing lost, nothing changed, nothing read twice, and TRL really trains on it."""
import json, os, random, subprocess, sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
import pytest
from PIL import Image
from realign_nb import inputs
from realign_nb.core import PreferencePair, image_hash
from realign_nb.formats import FORMATS, SUFFIXES, export_pairs, import_pairs, trl_dataset
from realign_nb.inputs import read_samples
from realign_nb.world import draw, make_scenes

pytestmark = pytest.mark.filterwarnings("ignore:.*<image> in their own words")
WORDS = ["[MASK]", "<image>", "\n", "\r\n", "\"", "'", "\\", "日本", "\u2028", "\U0001f408", " ", "{", "}", "None", "null", ",", "a cat", "<image>\n", "\t", "é", "e\u0301", "\x00", "</s>"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Twelve pictures, in and below a folder: PNG, JPEG, WebP, grey, with a palette, turned by EXIF."
    root = tmp_path_factory.mktemp("data") / "photos"
    (root / "below").mkdir(parents=True)
    for n, s in enumerate(make_scenes(12, "train", seed=1)):
        im, kw = draw(s).resize((48, 40)), {}
        suffix = [".png", ".jpg", ".webp"][n % 3]
        if n == 3: im = im.convert("P")
        if n == 4: im = im.convert("L"); exif = Image.Exif(); exif[0x0112] = 6; kw = dict(exif=exif)
        im.save(root / ("below" if n % 2 else "") / f"{n}{suffix}", **kw)
    return root


def paths(photos): return sorted(p for p in photos.rglob("*") if p.is_file() and len(p.stem) < 3)


def awkward(photos, n, seed=0):
    rng, files = random.Random(seed), paths(photos)
    text = lambda: "".join(rng.choices(WORDS, k=rng.randint(1, 9))) + "x"
    for i in range(n):
        v, v_l = rng.sample(files, 2)
        tried = [dict(rank=t, image=str(rng.choice(files)), text=text(), similarity=rng.random()) for t in (1, 2)]
        yield PreferencePair(f"{i}/{text()}", text(), str(v), str(v_l), text(), text(), text(), dict(rank=2, tried=tried, models=dict(policy="tiny"), note=text()))


# ---- inputs

def llava(photos, n=60):
    "Conversations, descriptions and text-only records in one file, ids shared by two records, every fifth picture no good"
    out = []
    for i in range(n):
        image = str(paths(photos)[i % 12].relative_to(photos)) if i % 5 else ["gone.jpg", "broken.jpg", "dot.png"][i // 5 % 3]
        talk = [{"from": "human", "value": [f"<image>\nQuestion {i}?", f"Question {i}?\n<image>"][i % 2]}, {"from": "gpt", "value": f"Answer {i}."},
                {"from": "human", "value": f"And {i}?"}, {"from": "gpt", "value": f"So {i}."}]
        out.append(dict(id=f"{i // 2:012d}", image=image, conversations=talk))
    return out + [dict(id="text", conversations=[{"from": "human", "value": "What is 1+1?"}, {"from": "gpt", "value": "2"}])]


@pytest.fixture
def folder(photos, tmp_path):
    "A copy with pictures that cannot be used"
    for p in photos.rglob("*"):
        if p.is_file(): (tmp_path / "photos" / p.relative_to(photos)).parent.mkdir(parents=True, exist_ok=True); (tmp_path / "photos" / p.relative_to(photos)).write_bytes(p.read_bytes())
    (tmp_path / "photos/broken.jpg").write_bytes(paths(photos)[2].read_bytes()[:90]); Image.new("RGB", (1, 1)).save(tmp_path / "photos/dot.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("turns", ["first", "all"])
def test_every_question_of_a_file_is_a_sample_or_counted(folder, tmp_path, turns):
    records = llava(folder); (tmp_path / "llava.json").write_text(json.dumps(records))
    samples, skipped = read_samples(tmp_path / "llava.json", folder, turns=turns)
    assert len(samples) + sum(s["samples"] for s in skipped) == 60 * (2 if turns == "all" else 1) + 1
    assert {s["image"] for s in skipped} == {"gone.jpg", "broken.jpg", "dot.png", "text"} and len(skipped) == 4
    assert not any("<image>" in s.prompt or s.prompt != s.prompt.strip() for s in samples) and all(image_hash(s.image) for s in samples)
    assert samples[0].prompt == "Question 1?" and samples[0].answer == "Answer 1."
    assert str(tmp_path) not in json.dumps(skipped)                           # reasons can be passed on


def test_ids_depend_on_the_record_alone(folder, tmp_path):
    records, seen = llava(folder), []
    for seed, kw in ((0, {}), (1, {}), (2, dict(turns="all")), (3, dict(limit=20))):
        random.Random(seed).shuffle(records); (tmp_path / "llava.json").write_text(json.dumps(records))
        samples, _ = read_samples(tmp_path / "llava.json", folder, **kw)
        ids = {s.id: s.prompt for s in samples}
        assert len(ids) == len(samples)
        seen.append({i: x for i, x in ids.items() if i.endswith("#0")})
    assert seen[0] == seen[1] == seen[2] and len(seen[3]) == 20 and seen[3].items() <= seen[0].items()


def test_each_picture_is_decoded_once_however_many_questions_and_readers(folder, tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(inputs, "image_hash", lambda p: (looked.append(p), image_hash(p))[1])
    (tmp_path / "llava.json").write_text(json.dumps(llava(folder))); hashes = {}
    read_samples(tmp_path / "llava.json", folder, turns="all", hashes=hashes)
    assert len(looked) == len(set(looked)) <= 15 and hashes == {p: image_hash(p) for p in hashes}
    read_samples(folder, hashes=hashes)
    assert len([p for p in looked if p in hashes]) == len(hashes) == 12


def test_all_sources_give_the_same_questions(photos, tmp_path):
    import datasets
    datasets.disable_progress_bars()
    rows = [dict(id=f"q{n}", image=p.relative_to(photos).as_posix(), prompt=f"What, {n}?", answer=f"A {n}.") for n, p in enumerate(paths(photos))]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows)); (tmp_path / "q.json").write_text(json.dumps(rows))
    ds = datasets.Dataset.from_list([r | dict(image=str(photos / r["image"])) for r in rows]).cast_column("image", datasets.Image())
    ds.save_to_disk(tmp_path / "saved"); ds.to_parquet(tmp_path / "q.parquet")
    listed = datasets.Dataset.from_list([r | dict(images=[str(photos / r["image"])]) for r in rows]).remove_columns("image").cast_column("images", datasets.List(datasets.Image()))
    sources = dict(jsonl=(tmp_path / "q.jsonl", photos), json=(tmp_path / "q.json", photos), dataset=(ds, tmp_path / "a"), saved=(tmp_path / "saved", tmp_path / "b"),
                   parquet=(tmp_path / "q.parquet", tmp_path / "c"), listed=(listed, tmp_path / "d"), paths=(datasets.Dataset.from_list(rows), photos))
    found = {name: [(s.id, s.prompt, s.answer, image_hash(s.image)) for s in read_samples(*source)[0]] for name, source in sources.items()}
    assert all(f == found["jsonl"] and len(f) == 12 for f in found.values())
    assert [Path(s.image).read_bytes() for s in read_samples(tmp_path / "q.parquet", tmp_path / "c")[0]] == [p.read_bytes() for p in paths(photos)]
    bare = [{s.id for s in read_samples(d.remove_columns("id"), tmp_path / "e")[0]} for d in (ds, ds.shuffle(seed=1))]
    assert bare[0] == bare[1] and len(bare[0]) == 12                          # without ids: named after content, not after place


def test_a_dataset_with_a_bad_row_goes_on(photos, tmp_path):
    import datasets
    cells = [dict(bytes=b"no picture", path=None), None, dict(bytes=None, path="gone.png"), dict(bytes=paths(photos)[0].read_bytes(), path=None)]
    ds = datasets.Dataset.from_dict(dict(image=cells, question=list("abcd")), features=datasets.Features(image=datasets.Image(), question=datasets.Value("string")))
    samples, skipped = read_samples(ds, tmp_path / "im")
    assert [s.prompt for s in samples] == ["d"] and [s["image"] for s in skipped] == ["record 1", "record 2", "record 3"]


def test_reading_changes_no_file_of_the_user(photos, tmp_path):
    f = tmp_path / "mine.jsonl"; f.write_text('{"image": "0.png", "prompt": "a"}\n{"image": "0.p')
    before = f.read_bytes()
    with pytest.raises(ValueError, match="mine.jsonl, line 2: not JSON"): read_samples(f, photos)
    assert f.read_bytes() == before


@pytest.mark.parametrize("record, text", [
    ({"image": "0.png"}, "line 1, field prompt or question or instruction: is missing; this record has image"),
    ({"prompt": "a"}, "line 1, field image: is missing"),
    ({"image": 3, "prompt": "a"}, "line 1, field image: is '3'"),
    ({"image": "/etc/x.png", "prompt": "a"}, "lies outside the image folder"),
    ({"image": "../x.png", "prompt": "a"}, "lies outside the image folder"),
    ({"image": "0.png", "prompt": " "}, "line 1, field prompt"),
    ({"image": "0.png", "conversations": "a"}, "line 1, field conversations"),
    ([1], "line 1: is"),
])
def test_a_malformed_record_is_named(photos, tmp_path, record, text):
    (tmp_path / "m.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError) as e: read_samples(tmp_path / "m.jsonl", photos)
    assert text in str(e.value) and "m.jsonl" in str(e.value)


def test_modules_are_light():
    code = "import sys, realign_nb.inputs, realign_nb.formats; print([m for m in ('datasets', 'pyarrow', 'torch', 'pandas', 'trl') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ---- formats

LOST = {"authors": ("masked", "provenance")}


def without(pair, format): return replace(pair, **{k: {} if k == "provenance" else "" for k in LOST.get(format, ())})


@pytest.mark.parametrize("format", FORMATS)
def test_there_and_back(photos, tmp_path, format):
    pairs = list(awkward(photos, 250)); f = tmp_path / f"p{SUFFIXES[format]}"
    export_pairs(pairs, f, format, root=photos)
    back = import_pairs(f, format, root=photos)
    assert list(back) == [without(p, format) for p in pairs]
    if format != "parquet": assert str(photos) not in f.read_text(encoding="utf-8")      # no path of this machine, not even in what was tried
    export_pairs(back, tmp_path / f"again{SUFFIXES[format]}", format, root=photos)       # and there again: the same file
    if format != "parquet": assert (tmp_path / f"again{SUFFIXES[format]}").read_bytes() == f.read_bytes()


@pytest.mark.parametrize("format", FORMATS)
def test_absolute_paths_and_pictures_in_memory(photos, tmp_path, format):
    p, q = awkward(photos, 2, seed=3)
    q = replace(q, image=draw(make_scenes(1, "train", seed=5)[0]), retrieved_image=Image.new("RGBA", (9, 9), (200, 10, 10, 120)))
    f = tmp_path / f"p{SUFFIXES[format]}"; export_pairs([p, q], f, format)
    a, b = import_pairs(f, format)
    for x, y in ((p, a), (q, b)): assert [image_hash(x.image), image_hash(x.retrieved_image)] == [image_hash(y.image), image_hash(y.retrieved_image)]
    if format != "parquet": assert a == without(p, format)


def test_from_format_to_format(photos, tmp_path):
    pairs = list(awkward(photos, 20, seed=7)); now = pairs
    for n, format in enumerate(("swift", "parquet", "trl", "swift", "authors", "trl", "parquet")):
        f = tmp_path / f"{n}{SUFFIXES[format]}"
        export_pairs(now, f, format, root=photos); now = import_pairs(f, format, root=photos)
    assert list(now) == [without(p, "authors") for p in pairs]


def test_swift_halves_in_any_order(photos, tmp_path):
    pairs = [replace(p, prompt=f"What, {n}?") for n, p in enumerate(awkward(photos, 30, seed=2))]
    pairs[3] = replace(pairs[3], rejected=pairs[3].chosen)                      # the printed line 13 makes such pairs
    f = tmp_path / "p.jsonl"; export_pairs(pairs, f, "swift", root=photos)
    lines = f.read_text(encoding="utf-8").split("\n")[:-1]; assert len(lines) == 60
    random.Random(0).shuffle(lines); f.write_text("\n".join(lines), encoding="utf-8")
    assert sorted(import_pairs(f, "swift", root=photos), key=lambda p: p.id) == sorted(pairs, key=lambda p: p.id)
    f.write_text("\n".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(ValueError, match="has no second half"): import_pairs(f, "swift", root=photos)


def test_swift_is_what_its_documentation_shows(photos, tmp_path):
    import datasets
    p = PreferencePair("1", "What is this?", str(photos / "0.png"), str(paths(photos)[5]), "This is a kitten.", "This is a puppy.", "This is a [MASK].")
    export_pairs([p], tmp_path / "p.jsonl", "swift")
    text, visual = map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines())
    talk = lambda y: [{"role": "user", "content": "<image>What is this?"}, {"role": "assistant", "content": y}]
    documented = [dict(messages=talk("This is a kitten."), images=[p.image], rejected_messages=talk("This is a puppy."), rejected_images=[p.image]),
                  dict(messages=talk("This is a kitten."), images=[p.image], rejected_messages=talk("This is a kitten."), rejected_images=[p.retrieved_image])]
    assert [{k: r[k] for k in d} for r, d in zip((text, visual), documented)] == documented
    rows = list(datasets.Dataset.from_json(str(tmp_path / "p.jsonl"), cache_dir=str(tmp_path / "cache")))
    assert rows == [text, visual] and not any(v is None for r in rows for v in r.values())


def test_authors_is_what_their_script_reads(photos, tmp_path):
    p, = awkward(photos, 1); p = replace(p, prompt="What is this?", chosen="A cup.", rejected="A bowl.")
    export_pairs([p], tmp_path / "pref.json", "authors", root=photos)
    for i, source in enumerate(json.load(open(tmp_path / "pref.json", "r"))):     # as their LazySupervisedDataset takes a record apart
        assert i == 0 and all(Image.open(os.path.join(photos, source[k])).convert("RGB") for k in ("image", "retrieved_image"))
        for side, y in (("chosen", "A cup."), ("rejected", "A bowl.")):
            roles = [s["role"] for s in source[side]]; words = [s["content"] for s in source[side]]
            assert roles == ["user", "assistant"] and words[0].replace("<image>", "").strip() == "What is this?" and words[1] == y


def test_parquet_opens_as_a_dataset_of_images(photos, tmp_path):
    import datasets
    datasets.disable_progress_bars()
    pairs = list(awkward(photos, 130)); export_pairs(pairs, tmp_path / "p.parquet", "parquet", root=photos)
    ds = datasets.Dataset.from_parquet(str(tmp_path / "p.parquet"), cache_dir=str(tmp_path / "cache"))
    assert isinstance(ds.features["image"], datasets.Image) and len(ds) == 130
    assert [image_hash(r["retrieved_image"]) for r in ds.select(range(120, 130))] == [image_hash(p.retrieved_image) for p in pairs[120:]]
    back = import_pairs(tmp_path / "p.parquet", "parquet", root=tmp_path / "out")
    assert all(Path(b.image).read_bytes() == Path(p.image).read_bytes() for p, b in zip(pairs, back))
    assert {x.relative_to(tmp_path / "out") for x in (tmp_path / "out").rglob("*") if x.is_file()} <= {x.relative_to(photos) for x in paths(photos)}


@pytest.mark.parametrize("change, text", [
    (dict(image="gone.png"), "pair 1, field image: gone.png: no such image file"),
    (dict(retrieved_image=__file__), "pair 1, field image"),
])
def test_a_picture_that_is_missing_or_outside_is_named(photos, tmp_path, change, text):
    p = replace(next(awkward(photos, 1)), id="1", **change)
    for format in FORMATS:
        with pytest.raises(ValueError) as e: export_pairs([p], tmp_path / f"p{SUFFIXES[format]}", format, root=photos)
        assert text in str(e.value)


def test_an_interrupted_export_leaves_the_old_file(photos, tmp_path):
    good, = awkward(photos, 1)
    for format in FORMATS:
        f = tmp_path / f"p{SUFFIXES[format]}"
        export_pairs([replace(good, prompt="old")], f, format, root=photos)
        with pytest.raises(ValueError): export_pairs([good, replace(good, image="gone.png")], f, format, root=photos)
        assert import_pairs(f, format, root=photos)[0].prompt == "old" and not list(tmp_path.glob("*.tmp"))


def test_words_that_trainers_take_for_a_picture_are_announced(photos, tmp_path):
    p = replace(next(awkward(photos, 1)), prompt="What does <image> mean?")
    for format in ("trl", "swift", "authors"):
        with pytest.warns(UserWarning, match="1 pair.*say <image>"): export_pairs([p], tmp_path / f"p{SUFFIXES[format]}", format, root=photos)


@pytest.mark.filterwarnings("ignore")
def test_trl_trains_on_it(photos, tmp_path):
    "TRL's own trainer and collator, on the JSON lines and on the dataset: a real step on the text half, with the pixels of v."
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer
    from realign_nb.tinyvlm import build
    torch.set_num_threads(1)
    pairs = [replace(p, prompt="What is it?", chosen=f"A cup, {n}.", rejected=f"A bowl and {n} cats.") for n, p in enumerate(awkward(photos, 4))]
    export_pairs(pairs, tmp_path / "p.jsonl", "trl")
    lines = load_dataset("json", data_files=str(tmp_path / "p.jsonl"), split="train", cache_dir=str(tmp_path / "cache"))
    model, processor = build(seed=0)
    losses = []
    for data in (lines, trl_dataset(pairs)):
        config = DPOConfig(output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, max_steps=2, learning_rate=1e-2, max_length=None, report_to=[], use_cpu=True,
                           bf16=False, logging_steps=1, save_strategy="no", disable_tqdm=True, seed=0)
        lora = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)", task_type="CAUSAL_LM")
        torch.manual_seed(0)
        t = DPOTrainer(model=deepcopy(model), args=config, train_dataset=data, processing_class=processor, peft_config=lora)
        t.train(); losses.append([h["loss"] for h in t.state.log_history if "loss" in h])
        batch = t.data_collator([data[0]])
        words = processor.tokenizer.batch_decode([ids[m.bool()] for ids, m in zip(batch["input_ids"], batch["completion_mask"])], skip_special_tokens=True)
        assert [w.strip() for w in words] == [pairs[0].chosen, pairs[0].rejected]
        v = processor.image_processor(Image.open(pairs[0].image).convert("RGB"), return_tensors="pt")["pixel_values"]
        assert torch.allclose(batch["pixel_values"], v.expand_as(batch["pixel_values"]))
    assert losses[0] == losses[1] and abs(losses[0][0] - .6931) < 1e-3 and losses[0][1] < losses[0][0] - 1e-3
