"""CHAIR: what counts as a mention, whose truth it is held against, and that the rules stay apart."""
import json
import subprocess
import sys

import numpy as np
import pytest

from realign_nb import bench, chair
from realign_nb.answers import count_chair, mentions
from realign_nb.chair import BASES, SYNONYMS, chair_items, chair_truth, coco_items, find_objects, listed_items, read_caption, singular, tokens

PATTERN = "chair_pattern"


def named(text, rule=PATTERN): return [k for k, *_ in read_caption(text, {}, rule)]


@pytest.fixture
def coco(tmp_path):
    "COCO's two kinds of files, one pair per split, and the items of three images."
    def write(name, **data): (tmp_path/name).write_text(json.dumps(data)); return tmp_path/name
    cats = [dict(id=1, name="person"), dict(id=6, name="bus"), dict(id=46, name="wine glass")]
    files = [[write(f"instances_{s}2014.json", images=[dict(id=i, file_name=f"COCO_{s}2014_{i:012}.jpg") for i in ids], categories=cats,
                    annotations=[dict(image_id=i, category_id=c) for i, c in marks]) for s, ids, marks in
              (("train", [9], [(9, 1), (9, 1)]), ("val", [42, 73, 99], [(42, 6), (73, 46), (73, 1)]))],
             [write(f"captions_{s}2014.json", annotations=[dict(image_id=i, caption=c) for i, c in said]) for s, said in
              (("train", [(9, "A man on a horse.")]), ("val", [(42, "Two buses and a bow tie."), (42, "A bus."), (73, "Wine."), (99, "An empty field.")]))]]
    return files, coco_items(*files, [42, 9, 99])


@pytest.mark.parametrize("word,base", [("bus", "bu"), ("buses", "bus"), ("ties", "ty"), ("tie", "tie"), ("glass", "glas"), ("glasses", "glass"), ("people", "person"),
    ("children", "child"), ("geese", "goose"), ("mice", "mouse"), ("oxen", "ox"), ("knives", "knife"), ("thieves", "thieve"), ("canoes", "cano"), ("collies", "collies"),
    ("sheep", "sheep"), ("scissors", "scissors"), ("skis", "ski"), ("women", "woman"), ("puppies", "puppy"), ("couches", "couch"), ("toothbrushes", "toothbrush"),
    ("vases", "vase"), ("horses", "horse"), ("calves", "calf"), ("taxis", "taxi"), ("s", "s"), ("is", "is"), ("this", "thi"), ("", "")])
def test_singular_as_the_original_forms_it(word, base): assert singular(word) == base


def test_quirks_are_part_of_the_number():
    assert named("A bus.") == [] and named("Buses.") == ["bus"]                       # one bus is never counted
    assert named("A man in a tie.") == ["person", "tie"] and named("Men in ties.") == ["person"]
    assert named("A minibus, an airbus") == []
    assert named("a motor bike") == [] and named("a motor cycle") == ["motorcycle"]   # a second blank in the published list
    assert named("an iPhone") == [] and named("a phone") == ["cell phone"]            # a capital in it
    assert named("a televison") == ["tv"]                                             # a slip of the pen in it
    assert named("a remote beach") == ["remote"]
    assert len(set(SYNONYMS.values())) == 80 and len(SYNONYMS) == 403


def test_double_words():
    assert named("A hot dog, two hot dogs.") == ["hot dog"]*2
    assert named("a teddy bear and a bear") == ["teddy bear", "bear"]
    assert named("a wine glass, wine glasses, a glass") == ["wine glass"]*2
    assert named("a laptop computer") == ["laptop"] and named("a laptop, a computer") == ["laptop"]*2
    assert named("the stove top oven") == ["oven"]*2                                  # three words: stove and oven count apart
    assert named("a cell\nphone") == ["cell phone"] and named("a cell-phone") == []
    assert named("a tennis racket") == ["tennis racket"]                              # tenni racket: racket counts alone
    assert named("trains on train tracks") == ["train"] and named("the home plate") == []


def test_animals_vehicles_and_the_toilet_seat():
    assert named("a baby elephant, adult giraffes, a baby cub, an adult animal") == ["elephant", "giraffe"]
    assert named("a baby and an adult") == ["person"]*2
    assert named("a passenger jet, a passenger train") == ["airplane", "train"] and named("a passenger car") == ["person", "car"]
    assert named("a toilet seat") == ["toilet"] and named("the seat of the toilet") == ["toilet"] and named("a seat") == ["chair"]


def test_tokens_keep_their_places():
    text = """Two "dogs", a man's 'hat' (red); e.g. 1,000 cups... it isn't the dogs' end. A cat—there/here."""
    found = tokens(text)
    assert all(text[a:b].lower() == t for t, a, b in found)
    assert [t for t, *_ in found] == ["two", '"', "dogs", '"', ",", "a", "man", "'s", "'", "hat", "'", "(", "red", ")", ";", "e.g", ".", "1,000", "cups", "...", "it", "is", "n't",
                                      "the", "dogs", "'", "end", ".", "a", "cat", "—", "there/here", "."]
    assert tokens("") == tokens(" \n") == []
    assert [t for t, *_ in tokens("1. Dogs.\n2. In 1999. (A cat.) 5.")] == ["1.", "dogs", ".", "2.", "in", "1999.", "(", "a", "cat", ".", ")", "5", "."]
    text = "A **Hot\n dog** and BUSES"
    assert [(k, text[a:b]) for k, a, b in read_caption(text, {}, PATTERN)] == [("hot dog", "Hot\n dog"), ("bus", "BUSES")]


def test_truth_from_instances_and_references(coco):
    files, items = coco
    assert [i["image_id"] for i in items] == [42, 9, 99] and items[0]["image"] == "COCO_val2014_000000000042.jpg"
    assert [i["objects"] for i in items] == [["bus"], ["person"], []]
    assert [chair_truth(i, PATTERN) for i in items] == [{"bus", "tie"}, {"person", "horse"}, set()]
    found = [dict(image_id=42, caption="Buses, a tie and a horse."), dict(image_id=9, caption="A woman on a horse."), dict(image_id=99, caption="A field.")]
    m = bench.score("chair", items, found, PATTERN)["metrics"]
    assert (m["chair_i"], m["chair_s"], m["recall"], m["length"]) == pytest.approx((1/5, 1/3, 1, 13/3))
    # the same captions against the instances alone would call the tie and the rider's horse made up
    m = bench.score("chair", [i | dict(references=[]) for i in items], found, PATTERN)["metrics"]
    assert m["chair_i"] == pytest.approx(3/5)


def test_truth_depends_on_the_rule():
    # a single bus in a reference is seen by WordNet's rule only; the lemmas here are typed, the real ones are below
    item = dict(image_id=1, image="", objects=[], references=["A bus."])
    assert chair_truth(item, PATTERN) == set()
    assert [k for k, *_ in find_objects("A bus.", lambda words: words)] == ["bus"]


def test_rules_are_not_mixed(coco):
    items, world = coco[1], chair_items([dict(image_id=42, image="", objects=["bus"])])
    said = [dict(image_id=42, caption="A bus beside buses.")]
    assert bench.score("chair", world, said)["rule"] == "world" and bench.score("chair", world, said, PATTERN)["rule"] == PATTERN
    a, b = (bench.count("chair", world, said, r).table.reshape(-1)[0] for r in ("world", PATTERN))
    assert (a, b) == (2, 1)
    with pytest.raises(ValueError, match="choose a rule for COCO: chair_pattern, chair_wordnet"): bench.score("chair", items, said)
    with pytest.raises(ValueError, match="no rule 'chair'"): bench.score("chair", items, said, "chair")
    listed = listed_items([dict(question_id=42, gt_object=["bus", "bus"])])
    assert listed[0]["objects"] == ["bus"]
    with pytest.raises(ValueError, match="made with chair_wordnet; chair_pattern would mix"): bench.score("chair", listed, said, PATTERN)
    assert bench.score("chair", listed_items([dict(image_id=42, gt_object=["bus"])], PATTERN), said, PATTERN)["metrics"]["chair_i"] == 0


def test_the_world_counts_as_before():
    rng = np.random.default_rng(0); kinds = ["dog", "hot dog", "bus", "cup", "knife", "person", "skis"]
    items = chair_items([dict(image_id=f"i{n}", image="", objects=list(rng.choice(kinds, 2))) for n in range(40)], kinds)
    says = lambda: " ".join(["A", *rng.choice(["dog", "hot dogs,", "buses", "cup.", "knives", "people", "red", "skis"], 6)])
    found = [dict(image_id=i["image_id"], caption=says()) for i in items[4:]] + [dict(image_id="i3", caption="")]
    of = {p["image_id"]: p["caption"] for p in found}
    c = bench.count("chair", items, found)
    assert c.table.sum((0, 1, 2)).tolist() == sum(count_chair(i, of.get(i["image_id"]), "world")[1] for i in items).tolist()
    assert c.faults["missing"] == ["i0", "i1", "i2"] and "i3" in c.faults["unparsable"]
    assert [m[:3] for m in map(list, mentions(found[0]["caption"], kinds))] == read_caption(found[0]["caption"], items[0], "world")


def test_all_right_all_wrong_and_one_flipped(coco):
    items = coco[1][:2]
    right = [dict(image_id=i["image_id"], caption=", ".join("buses" if k == "bus" else k for k in sorted(chair_truth(i, PATTERN)))) for i in items]
    score = lambda p: bench.score("chair", items, p, PATTERN)["metrics"]
    assert [score(right)[m] for m in ("chair_i", "chair_s", "recall")] == [0, 0, 1]
    wrong = [p | dict(caption="a couch and a pizza") for p in right]
    assert [score(wrong)[m] for m in ("chair_i", "chair_s", "recall")] == [1, 1, 0]
    one = [right[0] | dict(caption=right[0]["caption"]+", a couch"), right[1]]
    assert score(one)["chair_i"] == 1/5 and score(one)["chair_s"] == 1/2 and score(one)["recall"] == 1
    assert bench.score("chair", items[::-1], one[::-1], PATTERN) == bench.score("chair", items, one, PATTERN)


def test_missing_empty_and_doubled_captions(coco):
    items = coco[1]
    r = bench.score("chair", items, [dict(image_id=42, caption=""), dict(image_id=42, caption="buses"), dict(image_id=7, caption="a dog")], PATTERN)
    assert (r["missing"], r["duplicate"], r["unmatched"], r["unparsable"]) == (2, 1, 1, 1)
    assert r["metrics"] == dict(chair_i=0, chair_s=0, recall=0, length=0)             # the first caption of an image is the one that counts
    with pytest.raises(ValueError, match="stands twice"): bench.score("chair", items + items[:1], [dict(image_id=42, caption="")], PATTERN)


def test_the_list_of_images_is_in_the_score(coco):
    files, items = coco
    sha = lambda ids: bench.data_sha256(coco_items(*files, ids))
    assert sha([42, 9, 99]) == sha([99, 42, 9]) != sha([42, 9]) != sha([42, 73])
    assert bench.score("chair", items, [dict(image_id=42, caption="A bus.")], PATTERN)["data_sha256"] == sha([42, 9, 99])


def test_predictions_of_the_released_script_fit(coco):
    r = bench.score("chair", coco[1], [dict(question_id=42, text="Buses and a couch.")], PATTERN)
    assert (r["missing"], r["metrics"]["chair_i"]) == (2, .5)
    r = bench.score("chair", coco[1], [dict(image="COCO_val2014_000000000042.jpg", text="Buses and a couch.")], PATTERN)
    assert (r["missing"], r["metrics"]["chair_i"]) == (2, .5)


def test_errors_say_what_to_do(coco, tmp_path):
    (instances, captions), _ = coco
    with pytest.raises(ValueError, match=r"an id twice \(42\)"): coco_items(instances, captions, [42, 9, 42])
    with pytest.raises(ValueError, match="image 5 is in none"): coco_items(instances, captions, [5])
    with pytest.raises(ValueError, match="image 9 has no reference caption; give the captions file of its split"): coco_items(instances, captions[1], [9])
    with pytest.raises(ValueError, match="captions_val2014.json has no 'images'"): coco_items(captions[1], captions, [42])
    with pytest.raises(ValueError, match="'unicorn' in objects is no category of COCO"): chair_truth(dict(image_id=1, objects=["unicorn"]), PATTERN)
    with pytest.raises(ValueError, match="row 1 .* must be a list of names"): listed_items([dict(image_id=1, gt_object=[]), dict(image_id=2, gt_object="bus")])
    with pytest.raises(ValueError, match="row 0 has neither"): listed_items([dict(gt_object=[])])
    with pytest.raises(ValueError, match="item 1: references is 'A bus.'"): chair.check_item(dict(image_id=1, objects=[], references="A bus."))


def test_colours_show_the_parse():
    text = "A <b>dog</b> & a cat"
    html = chair.mark_mentions(text, read_caption(text, {}, PATTERN), {"dog"})
    assert html.count("<mark") == 2 and "cfe3ff" in html.split("dog")[0] and "made up" in html and "&lt;b" in html and "&amp;" in html


def test_import_is_light():
    code = "import sys, realign_nb.chair; print([m for m in ('torch', 'pandas', 'nltk', 'scipy', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_wordnet_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ValueError, match="NLTK_DATA to FOLDER.*ImportError|ModuleNotFoundError"): BASES["chair_wordnet"](["bus"])


def test_wordnet_itself():
    pytest.importorskip("nltk", reason="the rule chair_wordnet needs nltk")
    try: BASES["chair_wordnet"](["bus"])
    except ValueError as e: pytest.skip(str(e))
    wordnet = lambda text: named(text, "chair_wordnet")
    assert wordnet("A bus and two buses. Women in ties. Thieves in canoes.") == ["bus", "bus", "person", "tie", "person", "boat"]
    assert wordnet("Two men stand.") == [] and named("Two men stand.") == ["person"]  # "men" is a lemma of its own: the work force
    assert wordnet("People seated at desks.") == ["person", "chair", "dining table"]
    assert wordnet("People are skiing.") == ["person", "skis"] and named("People are skiing.") == ["person"]
    assert wordnet("A baby elephant near wine glasses, a hot dog on the toilet seat") == ["elephant", "wine glass", "hot dog", "toilet"]
    assert wordnet("") == []
    item = dict(image_id=1, image="", objects=[], references=["A bus."])
    assert chair_truth(item, "chair_wordnet") == {"bus"} and chair_truth(item, PATTERN) == set()
