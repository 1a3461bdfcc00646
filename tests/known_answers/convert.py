"""Compact files of published LLaVA-1.5 outputs -> items and predictions (or judge records), as lists of dicts or as JSON lines.

    python convert.py FILE OUT_FOLDER [--model 7b|13b]

writes OUT_FOLDER/items.jsonl and OUT_FOLDER/predictions.jsonl, for `realign-eval score`. The compact files hold no pictures and no questions, so the items
have only the fields that scoring needs. A model is named for the two files that hold judge replies to two models.
"""
import argparse
import json
from pathlib import Path

JUDGES = dict(mmvet="gpt-4-0613", llavabench="gpt-4-0314")  # as LLaVA's scripts name them


def pope(data, model=None):
    "A letter per question, in file order; the id is the split and the position."
    items, predictions = [], []
    for split, letters in data["splits"].items():
        for n, (label, said) in enumerate(zip(letters["labels"], letters["predictions"], strict=True)):
            items.append(dict(question_id=f"{split}/{n}", category=split, label=dict(y="yes", n="no")[label]))
            predictions.append(dict(question_id=f"{split}/{n}", text=dict(Y="Yes", N="No")[said]))
    return items, predictions


def mme(data, model=None):
    "Two rows per picture; the second one gets the id .../1."
    items, predictions, seen = [], [], {}
    for category, image, answer, text in data["rows"]:
        n = seen[category, image] = seen.get((category, image), -1) + 1
        items.append(dict(question_id=f"{category}/{image}/{n}", category=category, image=image, answer=answer))
        predictions.append(dict(question_id=f"{category}/{image}/{n}", text=text))
    return items, predictions


def scienceqa(data, model=None):
    return ([dict(question_id=q, answer=a, image="a picture" if im else None) for q, a, im, _ in data["rows"]],
            [dict(question_id=q, text=t) for q, _, _, t in data["rows"]])


def mmbench(data, model=None):
    return [dict(index=i, answer=a) for i, a, _ in data["rows"]], [dict(index=i, prediction=p) for i, _, p in data["rows"]]


def mmvet(data, model="7b"):
    "Grades of three judge runs become the replies that they were read from."
    grades = data[f"{model}_3runs"]
    return [dict(question_id=k) for k in grades], [dict(question_id=k, reply=str(g), run=n, judge=JUDGES["mmvet"]) for k, v in grades.items() for n, g in enumerate(v)]


def llavabench(data, model="7b"):
    "The first line of a review is what is read."
    runs = [data["runs"][k] for k in sorted(data["runs"]) if k.startswith(model + "_")]
    return ([dict(question_id=i, category=c) for i, c, *_ in runs[0]],
            [dict(question_id=i, reply=line, run=n, judge=JUDGES["llavabench"]) for n, rows in enumerate(runs) for i, _, line, _ in rows])


def vizwiz(data, model=None):
    "The test split has no public answers: as all ten answers stands the row that was uploaded, so the score is 100 where it is reproduced."
    return ([dict(image=f"{n}.jpg", question="", answers=[answer] * 10, answer_type="other") for n, (_, answer) in enumerate(data["rows"])],
            [dict(image=f"{n}.jpg", text=text) for n, (text, _) in enumerate(data["rows"])])


FILES = {"pope_llava15_13b": pope, "mme_llava15_13b": mme, "scienceqa_llava15_13b": scienceqa, "mmbench_dev_20230712_llava15_13b": mmbench,
         "mmvet_llava15_grades": mmvet, "llavabench_llava15_reviews": llavabench, "vizwiz_llava15_13b_normalised": vizwiz}


def convert(path, model=None):
    "Items and predictions of one compact file."
    path = Path(path)
    if path.stem not in FILES: raise ValueError(f"{path.name}: unknown; known are {', '.join(FILES)}")
    return FILES[path.stem](json.loads(path.read_text(encoding="utf-8")), *([model] if model else []))


def write(path, out, model=None):
    "The two files for the command line."
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("items", "predictions"), convert(path, model)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return out / "items.jsonl", out / "predictions.jsonl"


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file")
    p.add_argument("out")
    p.add_argument("--model", choices=["7b", "13b"])
    a = p.parse_args()
    print(*write(a.file, a.out, a.model), sep="\n")
