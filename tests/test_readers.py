"""Every benchmark in its official format and as a data set: the same questions, the same words, and errors that name the record."""
import json
import pickle
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest

import official_world as world
from realign_nb.doctor import COUNTS, HOME, doctor, examine, print_doctor
from realign_nb.join import FAMILIES, data_sha256, find_benchmark
from realign_nb.readers import HUB, LETTER, MAX_NEW_TOKENS, OFFICIAL, PROMPTS, SHORT, prompt, read_items
from realign_nb.sources import Picture, ReadError, in_folder

ALL = list(world.WRITERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory): return world.write_all(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def items(folders): return {b: read_items(b, f) for b, f in folders.items()}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    "The data sets' cache of this module alone, and no bars."
    import datasets
    old = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache"); datasets.disable_progress_bars()
    yield
    datasets.config.HF_DATASETS_CACHE = old; datasets.enable_progress_bars()


def rewrite(folder, name, change):
    "Change one file of a folder."
    f = folder / name
    f.write_text(change(f.read_text(encoding="utf-8")), encoding="utf-8")


def test_tables_cover_the_same_benchmarks():
    assert set(ALL) == set(OFFICIAL) == set(HUB) == set(PROMPTS) == set(MAX_NEW_TOKENS) == set(HOME) == set(COUNTS) == set(FAMILIES) & set(ALL)


@pytest.mark.parametrize("b", ALL)
def test_official_files(b, items):
    found = items[b]
    assert len(found) == world.COUNTS[b]
    for i in found:
        find_benchmark(b).check(i)
        assert prompt(b, i).strip()
        if i["image"] is not None: assert isinstance(i["image"], Picture) and i["image"].open().size == (96, 96)
    assert sum(i["image"] is None for i in found) == dict(scienceqa=6, hallusionbench=2).get(b, 0)
    json.dumps(found)                                                   # items can be written down


@pytest.mark.parametrize("b", ALL)
@pytest.mark.parametrize("saved", ["parquet", "disk"])
def test_data_sets_hold_the_same_questions(b, saved, items, tmp_path):
    import datasets
    made = {s: datasets.Dataset.from_list(rows) for s, rows in world.hub_rows(b, items[b]).items()}
    if saved == "disk": datasets.DatasetDict(made).save_to_disk(tmp_path / "d")
    else:
        (tmp_path / "d" / "data").mkdir(parents=True)
        for s, d in made.items(): d.to_parquet(tmp_path / "d" / "data" / f"{s}-00000-of-00001.parquet")
    again = read_items(b, tmp_path / "d")
    order = lambda xs: sorted(xs, key=lambda x: (x[0], str(x[1])))
    look = lambda i: (prompt(b, i), i["image"] and i["image"].open().tobytes())
    assert order(map(look, again)) == order(map(look, items[b]))
    for i in again: find_benchmark(b).check(i)
    truth = dict(pope="label", mme="answer", hallusionbench="gt_answer", scienceqa="answer", mmbench="answer", mmvet="answer", llavabench="reference", chair="objects").get(b)
    if truth: assert sorted(str(i[truth]) for i in again) == sorted(str(i[truth]) for i in items[b])
    assert examine(b, tmp_path / "d")[0]["found"].startswith("splits ")


@pytest.mark.parametrize("b", [b for b in ALL if b != "mmbench"])      # whose pictures are inside the table and have no files
def test_items_written_down_are_read_again(b, items, folders, tmp_path):
    "A plain file of items with the pictures elsewhere gives the same questions, and the same checksum."
    name = "HallusionBench.json" if b == "hallusionbench" else "val.json" if b == "vizwiz" else "TextVQA_0.5.1_val.json" if b == "textvqa" else "items_pope.jsonl" if b == "pope" else "items.jsonl"
    (tmp_path / name).write_text("".join(json.dumps(i) + "\n" for i in items[b]) if name.endswith("l") else json.dumps(items[b]))
    again = read_items(b, tmp_path / name, images=folders[b])
    assert data_sha256(again) == data_sha256(items[b]) and [prompt(b, i) for i in again] == [prompt(b, i) for i in items[b]]
    if b == "mme": return                                               # its pictures lie in the folders of the subtasks
    for i in again:
        if i["image"] is not None: i["image"].open()


def test_the_place_of_the_files_changes_nothing(items, tmp_path):
    moved = world.write_all(tmp_path / "elsewhere")
    assert {b: data_sha256(read_items(b, f)) for b, f in moved.items()} == {b: data_sha256(i) for b, i in items.items()}


def test_pope_files_of_llava(folders, items, tmp_path):
    "LLaVA's file of all splits: labels by split, picture and text, whatever the order; ids stay its own."
    (tmp_path / "coco").mkdir()
    for f in folders["pope"].glob("*.json"): (tmp_path / "coco" / f.name).write_bytes(f.read_bytes())
    rows = [dict(question_id=n, image=i["image"], text=i["text"] + SHORT, category=i["category"]) for n, i in enumerate(items["pope"][::-1])]
    (tmp_path / "llava_pope_test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    got = read_items("pope", tmp_path / "llava_pope_test.jsonl", images=folders["pope"])
    assert [(i["text"], i["label"], i["category"]) for i in got] == [(i["text"], i["label"], i["category"]) for i in items["pope"][::-1]]
    assert [i["question_id"] for i in got] == list(range(24)) and got[0]["image"].open()
    assert prompt("pope", got[0]).count(SHORT) == 1
    for f in (tmp_path / "coco").iterdir(): f.unlink()
    with pytest.raises(ReadError, match="question 0: field 'label' is missing, and no file coco_pope_"): read_items("pope", tmp_path / "llava_pope_test.jsonl")


def test_pope_keeps_the_slip_and_counts_what_is_there(folders, items):
    assert sum("imange" in i["text"] for i in items["pope"]) == 1 and "imange" in prompt("pope", next(i for i in items["pope"] if "imange" in i["text"]))
    assert [len(read_items("pope", folders["pope"], s)) for s in ("random", "popular", "adversarial")] == [8, 8, 8]


@pytest.mark.parametrize("n, state", [(2910, "ok"), (3000, "ok"), (2999, "other")])
def test_pope_counts(n, state):
    many = [dict(category="random")] * n + [dict(category=s) for s in ("popular", "adversarial") for _ in range(3000)]
    found = COUNTS["pope"](many)
    assert found["questions, random"][0] == n and ("ok" if n in found["questions, random"][1] else "other") == state and found["questions, popular"] == (3000, (3000,))


def test_prompts(items):
    "The words of LLaVA's scripts, record by record."
    p = {b: [prompt(b, i) for i in items[b]] for b in ALL}
    assert all(x.endswith("?" + SHORT) and "Please answer" not in x for x in p["mme"])
    assert all(x.endswith("?" + SHORT) for x in p["pope"])
    assert all(x == i["question"] for x, i in zip(p["hallusionbench"], items["hallusionbench"]))
    assert p["scienceqa"][0].startswith("Which of these") and p["scienceqa"][1].startswith("Context: There is a ") and all(x.endswith(LETTER) for x in p["scienceqa"])
    i = items["scienceqa"][0]
    assert prompt("scienceqa", i) == f"{i['question']}\nA. {i['choices'][0]}\nB. {i['choices'][1]}\nAnswer with the option's letter from the given choices directly."
    i = next(i for i in items["mmbench"] if "C" not in i)
    assert prompt("mmbench", i) == f"{i['question']}\nA. {i['A']}\nB. {i['B']}{LETTER}"
    assert prompt("mmbench", items["mmbench"][2]).startswith("Look closely.\nWhat is in the picture?\nA. ")
    assert p["textvqa"][0] == "Where is this?\nReference OCR token: STOP, " + world.SCENES[0].background.upper() + "\nAnswer the question using a single word or phrase."
    assert prompt("textvqa", items["textvqa"][0], ocr=False) == "Where is this?" + SHORT
    assert p["vizwiz"][0] == "What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\nAnswer the question using a single word or phrase."
    assert p["mmvet"][0] == "What is in the picture?" and set(p["chair"]) == {"Please describe this image in detail."}


def test_mmbench_rotations(folders, items, tmp_path):
    "Files with one row per question get the rotations that the official files have, and pictures may be given by another row's index."
    world.mmbench(tmp_path / "m", rotated=False)
    same = lambda xs: sorted((i["index"], i["answer"], i[i["answer"]]) for i in xs)
    assert same(read_items("mmbench", tmp_path / "m")) == same(items["mmbench"])
    lines = (tmp_path / "m" / "mmbench_dev_en_world.tsv").read_text().splitlines()
    cells = lines[2].split("\t"); assert len(cells[10]) > 100
    cells[10] = "241"; lines[2] = "\t".join(cells); (tmp_path / "m" / "mmbench_dev_en_world.tsv").write_text("\n".join(lines) + "\n")
    got = {i["index"]: i["image"].open().tobytes() for i in read_items("mmbench", tmp_path / "m")}
    assert got[242] == got[241] != got[243]


def test_textvqa_without_tokens(folders, tmp_path):
    (tmp_path / "TextVQA_0.5.1_val.json").write_bytes((folders["textvqa"] / "TextVQA_0.5.1_val.json").read_bytes())
    i = read_items("textvqa", tmp_path)[0]
    with pytest.raises(ReadError, match="question 34602: has no ocr_tokens; put TextVQA_Rosetta_OCR"): prompt("textvqa", i)
    assert prompt("textvqa", i, ocr=False)
    rows = {r["what"]: r["state"] for r in examine("textvqa", tmp_path)}
    assert rows["OCR tokens, part of the paper's prompt"] == "missing" and rows["questions"] == "other" and rows["pictures"] == "missing"


BROKEN = [  # benchmark, file, change, what the error says
    ("pope", "coco_pope_random.json", lambda t: t.replace('"text"', '"txt"', 1), "coco_pope_random.json, line 1: field 'text' is missing; the record has question_id, image, txt, label"),
    ("pope", "coco_pope_random.json", lambda t: t[:-20], "coco_pope_random.json, line 8: not JSON"),
    ("pope", "coco_pope_random.json", lambda t: t + t.splitlines()[0] + "\n", "question_id 'random/1' stands twice"),
    ("mme", "count/0001.txt", lambda t: t.replace("\t", " ", 1), "count/0001.txt, line 1: a question, a tab, and Yes or No"),
    ("mme", "count/0001.txt", lambda t: t + "Is it?\tYes\n", "count/0001.txt: 3 questions, MME has two"),
    ("hallusionbench", "HallusionBench.json", lambda t: t.replace('"./hallusion_bench/VS/chart/1_1.png"', "null", 1), "field 'filename' is null although visual_input is '1'"),
    ("hallusionbench", "HallusionBench.json", lambda t: t.replace('"gt_answer":', '"gt":', 1), "HallusionBench.json, record 1: field 'gt_answer' is missing"),
    ("scienceqa", "pid_splits.json", lambda t: t.replace('"1007"', '"9999"'), "pid_splits.json: test lists 9999, which problems.json does not have"),
    ("scienceqa", "problems.json", lambda t: t.replace('"choices"', '"options"', 1), "problems.json, record 1000: field 'choices' is missing"),
    ("mmbench", "mmbench_dev_en_world.tsv", lambda t: t.replace("\tB\tthings", "\tthings", 1), "mmbench_dev_en_world.tsv, line 2: has another number of cells than the 14"),
    ("textvqa", "TextVQA_0.5.1_val.json", lambda t: t.replace('"unanswerable", ', "", 1), "field 'answers' has 9 texts; TextVQA has ten"),
    ("vizwiz", "val.json", lambda t: t.replace('"question"', '"q"', 1), "val.json, record 1: field 'question' is missing"),
    ("mmvet", "mm-vet.json", lambda t: t.replace('"capability"', '"skills"', 1), "mm-vet.json, record v1_0: field 'capability' is missing"),
    ("llavabench", "context.jsonl", lambda t: "".join(l + "\n" for l in t.splitlines()[1:]), "context.jsonl, image 001.jpg: field 'caption' is missing"),
    ("llavabench", "answers_gpt4.jsonl", lambda t: "{}\n", "answers_gpt4.jsonl, question 0: field 'text' is missing"),
    ("chair", "annotations/instances_val2014.json", lambda t: t.replace('"images"', '"pictures"', 1), "instances_val2014.json has no 'images'"),
    ("chair", "annotations/chair_image_ids.json", lambda t: "[5]", "image 5 is in none of the instances files")]


@pytest.mark.parametrize("b, name, change, says", BROKEN, ids=[f"{b}-{n}" for n, (b, *_) in enumerate(BROKEN)])
def test_errors_name_file_record_and_field(b, name, change, says, tmp_path):
    "The reader raises, the doctor reports."
    folder = world.write_all(tmp_path, [b])[b]
    rewrite(folder, name, change)
    with pytest.raises(ValueError) as e: read_items(b, folder)
    assert says in str(e.value)
    rows = doctor(b, tmp_path)
    assert rows[-1]["state"] == "broken" and says in rows[-1]["found"]


@pytest.mark.parametrize("b", ALL)
def test_doctor(b, folders, tmp_path, capsys):
    rows = examine(b, folders[b])
    assert all(r["state"] == "ok" or r["state"] == "other" and r["advice"].startswith("published: ") for r in rows), rows
    assert rows[-1]["what"] == "pictures" and rows[-1]["state"] == "ok" and print_doctor(rows)
    rows = examine(b, tmp_path)
    assert {r["state"] for r in rows} == {"missing"} and all("Licence: " in r["advice"] for r in rows) and not print_doctor(rows)
    assert HOME[b][0][:20] in capsys.readouterr().out


def test_doctor_never_raises(folders, tmp_path):
    rows = doctor(None, folders["pope"].parent)
    assert list(dict.fromkeys(r["benchmark"] for r in rows)) == list(HOME) and {r["state"] for r in rows} == {"ok", "other"}
    assert {r["state"] for r in doctor(None, tmp_path / "nowhere")} == {"missing"}
    (tmp_path / "mmvet").mkdir(); (tmp_path / "mmvet" / "mm-vet.json").write_bytes(b"\xff\xfe\x00nonsense")
    assert doctor("mmvet", tmp_path)[-1]["state"] == "broken"
    (tmp_path / "pope").mkdir(); (tmp_path / "pope" / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    assert doctor("pope", tmp_path)[-1]["state"] == "broken"
    with pytest.raises(ReadError, match="unknown benchmark 'popes'"): doctor("popes", tmp_path)


def test_hallusionbench_counts_of_the_real_size():
    "Groups, figures and hard groups are counted as the official script counts them."
    real = [dict(category="VS", subcategory="chart", set_id="0", figure_id=str(f), question_id=str(q), visual_input=str(min(f, 2))) for f in range(3) for q in range(2)]
    real += [dict(category="VD", subcategory="ocr", set_id="0", figure_id=str(f), question_id="0", visual_input=str(f + 1)) for f in range(2)]
    assert {k: v[0] for k, v in COUNTS["hallusionbench"](real).items()} == {"questions": 8, "groups": 3, "figures": 4, "hard groups": 3}


def test_paths_that_are_nothing(tmp_path):
    with pytest.raises(ReadError, match="no such file or folder"): read_items("pope", tmp_path / "no" / "where" / "x")
    with pytest.raises(ReadError, match="unknown benchmark 'mmmu'; known: pope"): read_items("mmmu", tmp_path)
    with pytest.raises(ReadError, match="cannot be read as a data set"): read_items("mme", "lmms-lab/no-such-set-of-realign-nb")       # offline
    for b in "ab": (tmp_path / b).mkdir(); (tmp_path / b / "test-00000-of-00001.parquet").write_bytes(b"")
    with pytest.raises(ReadError, match="holds the configurations a and b"): read_items("mme", tmp_path)


def test_names_of_pictures(tmp_path):
    p = in_folder(tmp_path, "./sub/1.png")
    assert p == "sub/1.png" and deepcopy(p) == p and json.loads(json.dumps(p)) == p and pickle.loads(pickle.dumps(Picture("x"))) == "x"
    with pytest.raises(ValueError, match="sub/1.png: no such file in"): p.open()
    for bad in ("/etc/x.png", "../x.png", ""):
        with pytest.raises(ReadError, match="not a name below"): in_folder(tmp_path, bad)


def test_script(tmp_path):
    "The files are marked as what they are."
    r = subprocess.run([sys.executable, Path(world.__file__), tmp_path], capture_output=True, text=True, env=None)
    assert r.returncode == 0, r.stderr
    assert all("Not the benchmark" in (tmp_path / b / "NOTE.txt").read_text() for b in ALL)


def test_import_is_light():
    code = "import sys, realign_nb.readers, realign_nb.doctor; print([m for m in ('torch', 'transformers', 'pandas', 'datasets', 'PIL', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
