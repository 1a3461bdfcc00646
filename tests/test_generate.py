"""Algorithm 1 on the tiny VLM: masks, retrieval and waves at their edges."""
import random
from dataclasses import asdict, replace

import numpy as np
import pytest

from realign_nb.core import Run, Sample, image_hash, read_jsonl
from realign_nb.generate import accepted, balance_yes_no, generate_pairs, yes_or_no, yield_table
from realign_nb.masking import MASK, MASKABLE, MaskError, P_COMPLETE, P_MASK, check_mask, complete_prompt, mask_rate, rule_mask
from realign_nb.models import load_text_encoder, load_vlm
from realign_nb.retrieval import KnowledgeBase
from realign_nb.world import DESCRIBE, caption, draw, make_scenes, question


class Asked:
    "A real VLM whose questions are noted; `change` may rewrite its answers, `stop_after` ends it with an error after so many calls."
    def __init__(self, vlm, change=None, stop_after=None):
        self.vlm, self.name, self.fingerprint, self.change, self.stop_after, self.calls, self.prompts, self.questions = vlm, vlm.name, vlm.fingerprint, change, stop_after, 0, [], []

    def generate(self, prompts, images, max_new_tokens=64):
        if self.calls == self.stop_after: raise KeyboardInterrupt
        self.calls += 1
        self.prompts += prompts; self.questions += zip(prompts, map(str, images))
        out = self.vlm.generate(prompts, images, max_new_tokens=max_new_tokens)
        return [self.change(p, im, y) for p, im, y in zip(prompts, images, out)] if self.change else out


@pytest.fixture(scope="module")
def vlm(): return load_vlm("tiny", device="cpu")


@pytest.fixture(scope="module")
def encoder(): return load_text_encoder("minilm")


@pytest.fixture(scope="module")
def world(tmp_path_factory, vlm):
    "Twelve pictures as files, two samples each, and their knowledge base."
    folder, samples, paths = tmp_path_factory.mktemp("images"), [], []
    for s in make_scenes(12, "pairs", seed=11):
        path = str(folder / f"{s.id}.png")
        draw(s).save(path)
        paths.append(path)
        samples.append(Sample(f"{s.id}#0", DESCRIBE, path, caption(s, np.random.default_rng(0)), dict(source="world")))
        samples.append(Sample(f"{s.id}#1", question(s.kinds[0]), path, "Yes."))
    return samples, KnowledgeBase(vlm.embed(paths), paths)


@pytest.fixture(scope="module")
def full(world, vlm, encoder):
    "Every candidate of every sample: {sample id: list of tried}."
    pairs, misses = generate_pairs(world[0], vlm, world[1], encoder, "rule", take="last", k=4)
    return {p.id: p.provenance["tried"] for p in pairs} | {m.id: m.tried for m in misses}


def plain(records): return [asdict(r) for r in records]


def first(tried, tau=.95, accept="below"): return next((c for c in tried if c["text"] and accepted(c["similarity"], tau, accept)), None)


def test_first_and_last_are_the_first_and_last_accepted_candidate(world, vlm, encoder, full):
    samples, kb = world
    assert all([c["rank"] for c in tried] == [1, 2, 3, 4] for tried in full.values())
    for take, order in (("first", 1), ("last", -1)):
        for accept in ("below", "above"):
            pairs, misses = generate_pairs(samples, vlm, kb, encoder, "rule", k=4, take=take, accept=accept)
            want = {i: first(tried[::order], accept=accept) for i, tried in full.items()}
            assert {p.id: p.rejected for p in pairs} == {i: c["text"] for i, c in want.items() if c}
            assert {p.id: p.retrieved_image for p in pairs} == {i: c["image"] for i, c in want.items() if c}
            assert [m.id for m in misses] == sorted(i for i, c in want.items() if not c)
            assert all(len(p.provenance["tried"]) == (p.provenance["rank"] if take == "first" else 4) for p in pairs)
            assert all(len(m.tried) == 4 and m.reason.startswith("too similar" if accept == "below" else "too different") for m in misses)


def test_no_sample_is_lost_and_every_pair_is_a_pair(world, vlm, encoder):
    samples, kb = world
    pairs, misses = generate_pairs(samples, vlm, kb, encoder, "rule")
    assert sorted([*(p.id for p in pairs), *(m.id for m in misses)]) == sorted(s.id for s in samples)
    for p in pairs:
        s = next(s for s in samples if s.id == p.id)
        assert (p.prompt, p.image, p.chosen) == (s.prompt, s.image, s.answer) and p.retrieved_image != p.image
        assert check_mask(p.chosen, p.masked) and p.rejected != p.chosen
        prov = p.provenance
        assert prov["text_similarity"] < prov["tau"] == .95 and prov["rank"] == prov["tried"][-1]["rank"]
        a, b = encoder.encode([p.chosen, p.rejected], normalize_embeddings=True)
        assert prov["text_similarity"] == pytest.approx(float(a @ b), abs=1e-5)
        va, vb = (kb.unit[kb.row[x]] for x in (p.image, p.retrieved_image))
        assert prov["image_similarity"] == pytest.approx(float(va @ vb), abs=1e-5)
        assert {"k", "accept", "take", "completer", "see_instruction", "models"} <= set(prov)
    assert any(p.provenance.get("source") == "world" for p in pairs)
    table = yield_table(pairs, misses)
    assert table.samples.sum() == len(samples)


def test_order_of_samples_and_images_and_batch_size_change_nothing(world, vlm, encoder):
    samples, kb = world
    want = [plain(r) for r in generate_pairs(samples, vlm, kb, encoder, "rule", k=3)]
    mixed, order = random.Random(5).sample(samples, len(samples)), np.random.default_rng(5).permutation(len(kb))
    other = KnowledgeBase(kb.unit[order], [kb.ids[i] for i in order])
    assert [plain(r) for r in generate_pairs(mixed, vlm, other, encoder, "rule", k=3)] == want
    texts = lambda records: [(r["id"], r.get("rejected"), [c["text"] for c in (r.get("tried") or r["provenance"]["tried"])]) for r in records]
    small = generate_pairs(mixed, vlm, kb, encoder, "rule", k=3, batch_size=5)
    assert [texts(plain(r)) for r in small] == [texts(w) for w in want]


def test_duplicates_are_never_the_negative(tmp_path, vlm, encoder):
    scenes, paths, samples = make_scenes(4, "pairs", seed=12), [], []
    for n, s in enumerate(scenes):
        for copy, suffix in enumerate(("png", "bmp", "tiff")):
            paths.append(str(tmp_path / f"{n}-{copy}.{suffix}"))
            draw(s).save(paths[-1])
            samples.append(Sample(f"{n}-{copy}", DESCRIBE, paths[-1], caption(s, np.random.default_rng(0))))
    hashes = [image_hash(p) for p in paths]
    kb = KnowledgeBase(vlm.embed(paths), paths, hashes)
    same = dict(zip(paths, hashes))
    pairs, misses = generate_pairs(samples, vlm, kb, encoder, "rule", k=9, take="last")
    assert pairs and all(same[c["image"]] != same[p.image] for p in pairs for c in p.provenance["tried"])
    assert all(len(p.provenance["tried"]) == 9 for p in pairs)        # copies do not use up the k
    only = KnowledgeBase(vlm.embed(paths[:3]), paths[:3], hashes[:3])
    pairs, misses = generate_pairs(samples[:3], vlm, only, encoder, "rule", k=2)
    assert not pairs and {m.reason.split(":")[0] for m in misses} == {"no neighbour"}


def test_bad_input_is_refused_before_any_call(world, vlm, encoder):
    samples, kb = world
    asked = Asked(vlm)
    bad = {"k=12 neighbours of 12 images: there are 11 others": dict(k=12), "k=0": dict(k=0), "tau=0": dict(tau=0), "tau=1.5": dict(tau=1.5),
           "accept='near'": dict(accept="near"), "take='any'": dict(take="any"), "completer='me'": dict(completer="me"),
           "completer='annotator' asks the annotator": dict(completer="annotator"), "masker='prompt' asks the annotator": dict(masker="prompt"),
           "masker='x'": dict(masker="x"), "occurs twice": dict(samples=samples + samples[-1:]), "no samples": dict(samples=[]),
           "has no answer": dict(samples=[replace(samples[0], answer=None)]),
           "nowhere.png is not in the knowledge base": dict(samples=[replace(samples[0], image="nowhere.png")])}
    for text, kw in bad.items():
        kw = dict(samples=samples, masker="rule") | kw
        with pytest.raises(ValueError) as e: generate_pairs(kw.pop("samples"), asked, kb, encoder, kw.pop("masker"), **kw)
        assert text in str(e.value)
    assert asked.calls == 0


def test_nothing_to_mask_is_a_counted_miss(world, vlm, encoder):
    samples, kb = world
    odd = [replace(samples[0], id="odd", answer="It is a nice picture."), replace(samples[0], id="hole", answer=f"A {MASK} already.")]
    pairs, misses = generate_pairs([*samples[:4], *odd], vlm, kb, encoder, "rule")
    assert len(pairs) + len(misses) == 6
    why = {m.id: m.reason for m in misses}
    assert why["odd"].startswith("nothing to mask") and "contains [MASK]" in why["hole"]
    assert "missed, nothing to mask" in set(yield_table(pairs, misses).outcome)


def test_an_annotator_that_alters_words_is_counted(world, vlm, encoder):
    samples, kb = world
    def answer(prompt, image, y):
        assert prompt.startswith(P_MASK)
        masked = rule_mask(prompt[len(P_MASK):].strip())
        return masked.replace("there is", "one sees") if "there is" in masked else masked
    annotator = Asked(vlm, answer)
    pairs, misses = generate_pairs(samples, vlm, kb, encoder, "prompt", annotator=annotator)
    altered = {m.id for m in misses if m.reason.startswith("altered words")}
    assert altered == {s.id for s in samples if "there is" in s.answer} and altered
    assert all("'one sees" in m.reason for m in misses if m.id in altered)
    assert len(pairs) + len(misses) == len(samples) and len(annotator.prompts) == len(samples)
    rule, _ = generate_pairs([s for s in samples if s.id not in altered], vlm, kb, encoder, "rule")
    assert [p.rejected for p in pairs] == [p.rejected for p in rule]      # the faithful masks lead to the same pairs


def test_empty_completions_are_noted_and_not_accepted(world, vlm, encoder, full):
    samples, kb = world
    quiet = {c["image"] for tried in full.values() for c in tried[:1]}     # silent on what is every sample's first neighbour
    silent = Asked(vlm, lambda p, im, y: "  " if im in quiet else y)
    pairs, misses = generate_pairs(samples, silent, kb, encoder, "rule", k=4)
    assert len(pairs) + len(misses) == len(samples)
    tried = [c for p in pairs for c in p.provenance["tried"]] + [c for m in misses for c in m.tried]
    assert all((c["text"] == "") == (c["image"] in quiet) == c.get("reason", "").startswith("empty: ") for c in tried)
    assert all(p.rejected for p in pairs)
    mute, reasons = generate_pairs(samples, Asked(vlm, lambda p, im, y: ""), kb, encoder, "rule", k=2)
    assert not mute and {m.reason.split(":")[0] for m in reasons} == {"empty completion"} and all(len(m.tried) == 2 for m in reasons)


def test_who_completes_and_what_is_seen(world, vlm, encoder):
    samples, kb = world
    for completer in ("policy", "annotator"):
        for see in (True, False):
            policy, annotator = Asked(vlm), Asked(vlm)
            generate_pairs(samples, policy, kb, encoder, "rule", annotator=annotator, completer=completer, see_instruction=see, k=1)
            used, idle = (policy, annotator) if completer == "policy" else (annotator, policy)
            assert idle.calls == 0 and len(set(used.questions)) == len(used.questions) > len(samples) / 2   # equal questions are asked once
            want = {complete_prompt(rule_mask(s.answer), s.prompt if see else None) for s in samples}
            assert set(used.prompts) == want and all(P_COMPLETE in p for p in want)


def test_a_function_masks(world, vlm, encoder):
    samples, kb = world
    last_word = lambda text: " ".join(text.split()[:-1] + [MASK])
    pairs, _ = generate_pairs(samples[:6], vlm, kb, encoder, last_word)
    assert all(p.masked == last_word(p.chosen) for p in pairs)


def test_waves_ask_for_all_open_samples_of_a_rank_at_once(world, vlm, encoder, full):
    samples, kb = world
    asked = Asked(vlm)
    generate_pairs(samples, asked, kb, encoder, "rule", k=4, batch_size=1000)
    ranks = [len(samples), *(sum(first(tried[:t]) is None for tried in full.values()) for t in (1, 2, 3))]
    assert asked.calls == sum(n > 0 for n in ranks) and len(set(asked.questions)) == len(asked.questions) <= sum(ranks)


def test_a_broken_run_continues_and_ends_the_same(tmp_path, world, vlm, encoder):
    samples, kb = world
    def pairs(folder, policy): return [plain(r) for r in generate_pairs(samples, policy, kb, encoder, "rule", k=3, run=Run(folder, dict(k=3)), batch_size=6)]
    whole = Asked(vlm)
    want = pairs(tmp_path / "whole", whole)
    for stop in range(whole.calls):
        folder = tmp_path / f"stop{stop}"
        with pytest.raises(KeyboardInterrupt): pairs(folder, Asked(vlm, stop_after=stop))
        rest = Asked(vlm)
        assert pairs(folder, rest) == want and rest.calls == whole.calls - stop       # finished batches are not asked again
    again = Asked(vlm)
    assert pairs(tmp_path / "whole", again) == want and again.calls == 0


@pytest.mark.filterwarnings("ignore:.*torn last line")
def test_a_torn_last_line_is_done_again(tmp_path, world, vlm, encoder):
    samples, kb = world
    def pairs(policy=vlm): return [plain(r) for r in generate_pairs(samples, policy, kb, encoder, "rule", k=2, run=Run(tmp_path / "run", {}), batch_size=6)]
    want = pairs()
    log = tmp_path / "run/calls.jsonl"
    def kept(): return [(line["stage"], [(r["key"], r["text"]) for r in line["replies"]]) for line in read_jsonl(log)]
    data, lines = log.read_bytes(), kept()
    for cut in (1, 30, len(data) - data.rstrip(b"\n").rfind(b"\n") - 2):
        log.write_bytes(data[:-cut])
        asked = Asked(vlm)
        assert pairs(asked) == want and asked.calls == 1 and kept() == lines


def test_more_samples_in_the_same_run_ask_only_for_themselves(tmp_path, world, vlm, encoder):
    samples, kb = world
    few, _ = generate_pairs(samples[:6], vlm, kb, encoder, "rule", k=1, run=Run(tmp_path / "run", {}))
    asked = Asked(vlm)
    more, _ = generate_pairs(samples[:8], asked, kb, encoder, "rule", k=1, run=Run(tmp_path / "run", {}))
    assert len(asked.prompts) == 2 and {p.id: p.rejected for p in few}.items() <= {p.id: p.rejected for p in more}.items()


def test_balance_drops_the_surplus_only(world, vlm, encoder):
    samples, kb = world
    no = [replace(s, id=f"{s.id}n", answer="No.") for s in samples if yes_or_no(s.answer)][:3]
    pairs, _ = generate_pairs([*samples, *no], vlm, kb, encoder, "rule", k=8, accept="above", tau=.1)   # accepts nearly everything
    count = lambda ps: {v: sum(yes_or_no(p.chosen) == v for p in ps) for v in ("yes", "no", None)}
    before = count(pairs)
    assert before["yes"] > before["no"] > 0
    for seed in (0, 1):
        kept, dropped = balance_yes_no(pairs, seed)
        assert count(kept) == {"yes": before["no"], "no": before["no"], None: before[None]}
        assert sorted(r.id for r in [*kept, *dropped]) == sorted(p.id for p in pairs)
        assert all(m.reason.startswith("balance") and m.tried for m in dropped)
        shuffled = random.Random(seed).sample(pairs, len(pairs))
        assert {p.id for p in balance_yes_no(shuffled, seed)[0]} == {p.id for p in kept}
    assert {p.id for p in balance_yes_no(pairs, 0)[0]} != {p.id for p in balance_yes_no(pairs, 1)[0]}


def test_any_faithful_mask_is_accepted_and_put_back():
    rng, words = random.Random(0), "a the dog cat red is of [x] dog, park. Yes; two (big) a a".split()
    for _ in range(3000):
        text = [rng.choice(words) for _ in range(rng.randint(1, 12))]
        hidden = [rng.random() < .4 for _ in text]
        if not any(hidden): continue
        masked = " ".join(MASK if h else w for w, h in zip(text, hidden))
        segments = check_mask(" ".join(text), masked)
        assert len(segments) == sum(hidden) and all(s.strip() for s in segments)
        for s in segments: masked = masked.replace(MASK, s, 1)
        assert masked == " ".join(text) and 0 < mask_rate(" ".join(text), " ".join(MASK if h else w for w, h in zip(text, hidden))) <= 1


def test_any_altered_word_is_refused():
    rng, words = random.Random(1), [f"w{i}" for i in range(40)]
    for _ in range(2000):
        text = rng.sample(words, rng.randint(3, 12))                     # words occur once, so a hole has one meaning
        masked = [MASK if rng.random() < .3 else w for w in text]
        plain_words = [i for i, w in enumerate(masked) if w != MASK]
        if not plain_words or len(plain_words) == len(text): continue
        i, bad = rng.choice(plain_words), list(masked)
        how = rng.choice(["other", "extra", "swap"])
        if how == "other": bad[i] = "new"
        if how == "extra": bad.insert(i, "new")
        if how == "swap":
            j = rng.choice(plain_words)
            if i == j: continue
            bad[i], bad[j] = bad[j], bad[i]
        with pytest.raises(MaskError): check_mask(" ".join(text), " ".join(bad))


@pytest.mark.parametrize("text, masked", [("a dog", "a [MASK] dog"), ("a dog", "[MASK] a dog"), ("a dog", "a dog [MASK]"), ("a dog", "a dog[MASK]"),
                                          ("dog", "[MASK] [MASK]"), ("a a", "a [MASK] a"), ("a b a", "a [MASK] b a")])
def test_a_hole_for_nothing_is_refused(text, masked):
    with pytest.raises(MaskError, match="altered words"): check_mask(text, masked)


def test_the_threshold_itself_is_accepted_by_neither_reading():
    assert not accepted(.95) and not accepted(.95, accept="above") and accepted(.9499) and accepted(.9501, accept="above")


def test_rule_mask_touches_whole_words_of_the_list_only():
    rng, fillers = random.Random(2), ["carpet", "doggedly", "It", "seems", "(", ")", "Redwood,", "knows", "left-hand", "t-shirt", "notes", "of", "the"]
    for _ in range(1000):
        parts = [(w, w in MASKABLE) for w in (rng.choice(rng.choice([list(MASKABLE), fillers])) for _ in range(8))]
        text = " | ".join(w.title() if rng.random() < .3 else w for w, _ in parts)
        assert rule_mask(text).split(" | ") == [MASK if hidden else t for t, (_, hidden) in zip(text.split(" | "), parts)]


def test_faiss_and_numpy_find_the_same(vlm):
    rng = np.random.default_rng(3)
    for n, d, copies in ((2, 3, 1), (60, 8, 1), (60, 8, 5), (200, 2, 1)):
        x = np.repeat(rng.normal(size=(n, d)), copies, axis=0)
        ids, hashes = [f"{i}" for i in range(len(x))], [f"{i // copies}" for i in range(len(x))]
        k = min(7, len(x) - copies)
        a, b = (KnowledgeBase(x, ids, hashes, backend).search(ids, k) for backend in ("faiss", "numpy"))
        assert a == b and all(len(h) == k and i not in {x.id for x in h} for i, h in a.items())
        assert all(hashes[int(h.id)] != hashes[int(i)] for i, hits in a.items() for h in hits)
