"""Small files in the official format of each of the ten benchmarks, made from the embedded world. They are no part of the benchmarks.

    python tests/official_world.py FOLDER      writes FOLDER/pope, FOLDER/mme, ...; each with a NOTE.txt that says so

Twelve or so questions each, about drawn pictures whose content is known; the truth of every answer holds.
"""
import base64, csv, io, json, random, sys
from pathlib import Path

from realign_nb.choice import rotations
from realign_nb.world import KINDS, caption, draw, make_scenes, question
from realign_nb.yes_no import MME_SUMS, pope_items

NOTE = "Made by tests/official_world.py from the embedded world of realign_nb, in the format of {}. Not the benchmark, and no part of it.\n"
SCENES = make_scenes(4, "eval", seed=11)


def dump(path, data, lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in data) if lines else json.dumps(data), encoding="utf-8")


def picture(path, scene):
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(scene).save(path)


def absent(scene, n=0): return [k for k in KINDS if k not in scene.kinds][n]


def coco(n): return f"COCO_val2014_{n:012d}.jpg"


def pope(root):
    truths = [dict(image_id=n, image=coco(n), objects=s.kinds) for n, s in enumerate(SCENES)]
    for n, s in enumerate(SCENES): picture(root / "val2014" / coco(n), s)
    items = pope_items(truths, [s.kinds for s in make_scenes(50, "train", 1)], n_positive=1)
    for split in ("random", "popular", "adversarial"):
        rows = [dict(question_id=n, image=i["image"], text=i["text"], label=i["label"]) for n, i in enumerate((i for i in items if i["split"] == split), 1)]
        if split == "random": rows[0]["text"] = rows[0]["text"].replace("image", "imange")         # an official slip
        dump(root / f"coco_pope_{split}.json", rows, lines=True)


def mme(root):
    for c in sum(MME_SUMS.values(), []):
        n = len(c) % len(SCENES); s = SCENES[n]
        apart = c in ("artwork", "celebrity", "landmark", "posters", "scene")                       # these five have two folders
        picture(root / c / ("images" if apart else "") / f"{n:04}.png", s)
        text = "".join(f"{question(k)} Please answer yes or no.\t{a}\n" for k, a in ((s.kinds[0], "Yes"), (absent(s), "No")))
        folder = root / c / ("questions_answers_YN" if apart else ""); folder.mkdir(exist_ok=True)
        (folder / f"{n:04}.txt").write_text(text)


def hallusionbench(root):
    out = []
    for n, s in enumerate(SCENES[:2]):
        cat, sub = (("VD", "illusion"), ("VS", "chart"))[n]
        figures = [("0", "0")] * (cat == "VS") + [("1", str(int(cat == "VS"))), ("2", str(1 + int(cat == "VS")))]
        for visual, figure in figures:
            shown = SCENES[2 + n] if visual == "2" else s
            name = f"./hallusion_bench/{cat}/{sub}/{n}_{figure}.png" if visual != "0" else None
            if name: picture(root / name, shown)
            for q, k in enumerate((s.kinds[0], absent(s))):
                there = k in shown.kinds and visual != "0"
                out.append(dict(category=cat, subcategory=sub, visual_input=visual, set_id=str(n), figure_id=figure, sample_note="", question_id=str(q),
                                question=question(k), gt_answer_details=f"There is {'a' if there else 'no'} {k}.", gt_answer=str(int(there)), filename=name))
    dump(root / "HallusionBench.json", out)


def scienceqa(root):
    problems = {}
    for n in range(12):
        s, i = SCENES[n % 4], str(1000 + 7 * n)
        if n % 2 == 0: picture(root / "images" / "test" / i / "image.png", s)
        choices = [absent(s, 1), s.kinds[0], absent(s, 2)][:2 + n % 2]
        problems[i] = dict(question="Which of these is in the picture?" if n % 2 == 0 else f"Which of these is named in the context?", choices=choices, answer=1,
                           hint="" if n % 2 == 0 else f"There is a {s.kinds[0]}.", image="image.png" if n % 2 == 0 else None, task="closed choice", grade=f"grade{1 + n}",
                           subject=("natural science", "social science", "language science")[n % 3], topic="world", category="things", skill="look", lecture="", solution="", split="test")
    problems["1"] = dict(problems["1000"], split="train")
    dump(root / "problems.json", problems)
    dump(root / "pid_splits.json", dict(train=["1"], val=[], test=[i for i in problems if i != "1"]))


def mmbench(root, rotated=True):
    root.mkdir(parents=True, exist_ok=True); rows = []
    for n, s in enumerate(SCENES):
        buf = io.BytesIO(); draw(s).save(buf, "JPEG")
        four = [absent(s, 1), s.kinds[0], absent(s, 2), absent(s, 3)][:2 + n % 3]
        item = dict(index=241 + n, question="What is in the picture?", hint="Look closely." if n % 2 else "", **dict(zip("ABCD", four)), answer="B", category="things",
                    **{"l2-category": "perception"}, image=base64.b64encode(buf.getvalue()).decode(), source="world", comment="", split="dev")
        rows += rotations(item) if rotated else [item]
    head = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category", "image", "source", "comment", "split"]
    with open(root / "mmbench_dev_en_world.tsv", "w", newline="", encoding="utf-8") as f:
        w = csv.DictWriter(f, head, delimiter="\t", restval=""); w.writeheader(); w.writerows(rows)


def textvqa(root):
    data, ocr = [], []
    for n, s in enumerate(SCENES):
        image = f"{n:016x}"; picture(root / "train_images" / f"{image}.jpg", s)
        ocr.append(dict(image_id=image, ocr_tokens=["STOP", s.background.upper()], ocr_info=[]))
        for q, (text, answer) in enumerate((("where is this?", s.background), ("what is the first word?", "stop"), ("what thing is there?", s.kinds[0]))):
            data.append(dict(image_id=image, question_id=34602 + 3 * n + q, question=text, question_tokens=text[:-1].split(), image_width=96, image_height=96,
                             answers=[answer] * 8 + ["unanswerable", answer + "s"], set_name="val", flickr_original_url="", image_classes=s.kinds))
    dump(root / "TextVQA_0.5.1_val.json", dict(dataset_type="val", dataset_name="textvqa", dataset_version="0.5.1", data=data))
    dump(root / "TextVQA_Rosetta_OCR_v0.2_val.json", dict(data=ocr))


def vizwiz(root):
    rows = []
    for n in range(12):
        s, name = SCENES[n % 4], f"VizWiz_val_{n:08}.jpg"
        picture(root / "val" / name, s)
        text, answer, kind = (("What is this?", s.kinds[0], "other"), ("Is there a " + s.kinds[0] + "?", "yes", "yes/no"), ("What does the label say?", "unanswerable", "unanswerable"))[n % 3]
        rows.append(dict(image=name, question=text, answers=[dict(answer=answer, answer_confidence="yes")] * 10, answer_type=kind, answerable=int(kind != "unanswerable")))
    dump(root / "val.json", rows)
    dump(root / "test.json", [dict(image=r["image"].replace("val", "test"), question=r["question"]) for r in rows])


def mmvet(root):
    out = {}
    for n in range(12):
        s = SCENES[n % 4]; picture(root / "images" / f"v1_{n % 4}.png", s)
        caps = (["rec"], ["rec", "spat"], ["rec", "know", "gen"])[n % 3]
        out[f"v1_{n}"] = dict(imagename=f"v1_{n % 4}.png", question=("What is in the picture?", "Where is it?", "Describe the picture.")[n % 3],
                              answer=("<AND>".join(s.kinds), s.background, "<OR>".join(s.kinds))[n % 3], imagesource="world", capability=caps)
    dump(root / "mm-vet.json", out)


def llavabench(root):
    rng = random.Random(0); questions, answers = [], []
    for n in range(12):
        s = SCENES[n // 3]; picture(root / "images" / f"{n // 3 + 1:03}.jpg", s)
        kind = ("conv", "detail", "complex")[n % 3]
        questions.append(dict(question_id=n, image=f"{n // 3 + 1:03}.jpg", text=("What is in the picture?", "Describe this picture in detail.", "Why are these things here?")[n % 3], category=kind))
        answers.append(dict(question_id=n, text=f"It shows the {s.background} with {', '.join(s.kinds)}.", answer_id=f"a{n}", model_id="text", metadata={}))
    dump(root / "questions.jsonl", questions, lines=True)
    dump(root / "answers_gpt4.jsonl", rng.sample(answers, 12), lines=True)
    dump(root / "context.jsonl", [dict(id=f"{n + 1:03}", image=f"{n + 1:03}.jpg", caption=f"The {s.background} with {', '.join(s.kinds)}.") for n, s in enumerate(SCENES)], lines=True)


def chair(root):
    import numpy as np
    rng = np.random.default_rng(0); scenes = make_scenes(12, "eval", seed=12)
    ids = [100 + 3 * n for n in range(len(scenes))]; number = {k: n + 1 for n, k in enumerate(KINDS)}
    for i, s in zip(ids, scenes): picture(root / "val2014" / coco(i), s)
    images = [dict(id=i, file_name=coco(i), width=96, height=96) for i in ids]
    things = [(i, t) for i, s in zip(ids, scenes) for t in s.things]
    dump(root / "annotations" / "instances_val2014.json", dict(images=images, categories=[dict(id=n, name=k) for k, n in number.items()],
         annotations=[dict(id=n, image_id=i, category_id=number[t.kind], bbox=[t.x, t.y, t.size, t.size]) for n, (i, t) in enumerate(things)]))
    dump(root / "annotations" / "captions_val2014.json", dict(images=images, annotations=[dict(id=5 * n + k, image_id=i, caption=caption(s, rng))
                                                                                       for n, (i, s) in enumerate(zip(ids, scenes)) for k in range(5)]))
    dump(root / "annotations" / "chair_image_ids.json", ids[:12])


WRITERS = dict(pope=pope, mme=mme, hallusionbench=hallusionbench, scienceqa=scienceqa, mmbench=mmbench, textvqa=textvqa, vizwiz=vizwiz, mmvet=mmvet, llavabench=llavabench, chair=chair)
COUNTS = dict(pope=24, mme=28, hallusionbench=10, scienceqa=12, mmbench=11, textvqa=12, vizwiz=12, mmvet=12, llavabench=12, chair=12)  # questions in what is written


def write_all(root, names=WRITERS):
    "Folder of each benchmark by its name."
    root = Path(root)
    for b in names:
        WRITERS[b](root / b)
        (root / b / "NOTE.txt").write_text(NOTE.format(b))
    return {b: root / b for b in names}


def hub_rows(benchmark, items):
    "The rows of the Hugging Face data set of a benchmark, split by split, from the items of its official files."
    image = lambda i: i["image"] and i["image"].open()
    make = dict(
        pope=lambda n, i: dict(id=str(n), question_id=i["question_id"].split("/")[1], question=i["text"], answer=i["label"], image_source=i["image"][:-4], image=image(i), category=i["category"]),
        mme=lambda n, i: dict(question_id=i["question_id"].rsplit("/", 1)[0], image=image(i), question=i["question"], answer=i["answer"], category=i["category"]),
        hallusionbench=lambda n, i: {k: v for k, v in i.items() if k != "image"} | ({} if i["image"] is None else dict(image=image(i))),
        scienceqa=lambda n, i: {k: v for k, v in i.items() if k not in ("question_id", "split", "image")} | dict(image=image(i), lecture="", solution=""),
        mmbench=lambda n, i: {k.replace("l2", "L2"): v for k, v in i.items() if k != "image"} | {c: i.get(c, "nan") for c in "ABCD"} | dict(hint=i["hint"] or "nan", image=image(i)),
        textvqa=lambda n, i: {k: i[k] for k in ("image_id", "question_id", "question", "question_tokens", "answers", "ocr_tokens")} | dict(image=image(i)),
        vizwiz=lambda n, i: dict(question_id=i["question_id"], image=image(i), question=i["question"], answers=[a["answer"] for a in i["answers"]], category=i["answer_type"]),
        mmvet=lambda n, i: dict(question_id=i["question_id"], image=image(i), question=i["question"], answer=i["answer"], image_source=i["imagesource"], capability=",".join(i["capability"])),
        llavabench=lambda n, i: dict(question_id=i["question_id"], question=i["text"], image=image(i), category=i["category"], caption=i["caption"], gpt_answer=i["reference"], image_id=i["image"][:-4]),
        chair=lambda n, i: dict(question_id=str(i["image_id"]), image=image(i), gt_object=i["objects"]))[benchmark]
    where = dict(pope=lambda i: "test", mme=lambda i: "test", hallusionbench=lambda i: "non_image" if i["image"] is None else "image", scienceqa=lambda i: "test", mmbench=lambda i: "dev",
                 textvqa=lambda i: "validation", vizwiz=lambda i: "val", mmvet=lambda i: "test", llavabench=lambda i: "train", chair=lambda i: "test")[benchmark]
    out = {}
    for n, i in enumerate(items): out.setdefault(where(i), []).append(make(n, i))
    return out


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"): sys.exit(__doc__)
    for b, folder in write_all(sys.argv[1]).items(): print(f"{b:15} {COUNTS[b]:3} questions in {folder}")
