"""The audit of the paper's tables from the packaged data, writers, ranks, our scores beside them, and realign-tables as a command."""
import json, random, re, subprocess, sys
from copy import deepcopy
from fractions import Fraction
import numpy as np
import pytest
from realign_nb.tables import (DENOMINATORS, MEASURED, RIM, TIES, Table, audit, average_rank, combine, count_behind, figure1_panels, figure4_points, latex, paper_data, published,
                               to_html, to_latex, to_markdown)
from realign_nb.tables_cli import draw, main_tables, read_scores


def changed(table, backbone, method, column, value, key="cells"):
    data = deepcopy(paper_data())
    next(r for r in data["tables"][table]["rows"] if (r["backbone"], r["method"]) == (backbone, method))[key][column] = value
    return data


# ---- the audit

def test_deltas_of_table_3():
    d = audit()["deltas"]
    assert (d["tested"], d["agree"]) == (33, 30)
    assert [(x["backbone"], x["method"], x["column"], x["printed"], x["computed"]) for x in d["differ"]] == [
        ("LLaVA-v1.5-13B", "Re-Align", c, p, q) for c, p, q in (("POPE_r", "1.95", "1.96"), ("POPE_p", "1.30", "1.67"), ("POPE_a", "0.74", "0.60"))]
    assert "(2620 - 2563)/2910 = 1.9588 %, cut" in d["differ"][0]["equals"]
    assert all(x["equals"] == "it is the difference to the row CSR (3Iter)" for x in d["differ"][1:])


def test_ranks_of_table_2():
    a, b = audit()["ranks"]
    assert a["competition"] == [3.375, 3.75, 3.625, 2.5, 1.375] and b["competition"] == [2.125, 2.625, 1.25]
    assert a["dense"] == [3.375, 3.625, 3.375, 2.5, 1.375] and a["printed"][1] == a["printed"][2] == "3.625"
    for found in (a, b):                                            # worked out once by other means, in the data
        known = paper_data()["avg_rank"][found["backbone"]]
        assert all(found[t] == [float(x) for x in known[k]] for t, k in (("competition", "min"), ("dense", "dense"), ("average", "average")))


def test_counts():
    c = audit()["counts"]
    assert (c["tested"], c["rounded"], c["cut"], len(c["fail"])) == (161, 131, 25, 5)
    assert [(x["table"], x["method"], x["column"], x["printed"], x["n"], round(x["implied"], 2)) for x in c["fail"]] == [
        (1, "SIMA", "Hallusion_Easy", "43.0549", 455, 195.9), (1, "SIMA", "Hallusion_a", "45.2728", 1129, 511.13), (1, "Re-Align", "Hallusion_Easy", "45.5165", 455, 207.1),
        (1, "Re-Align", "Hallusion_a", "47.6156", 1129, 537.58), (3, "Re-Align", "POPE_r", "88.94", 2910, 2588.15)]
    for x in paper_data()["checks"]["grid"]:                        # cell by cell
        found = count_behind(x["value"], x["denominator"]); known = (x["match"] or [dict(correct=None, how=None)])[0]
        assert DENOMINATORS[x["column"]] == x["denominator"]
        assert (found["count"], found["how"]) == (known["correct"], {"truncated": "cut"}.get(known["how"], known["how"])), x


def test_every_count_is_found_again():
    rng = random.Random(0)
    for n in (7, 346, 455, 1129, 2910, 4241):
        for c in [0, n, *(rng.randrange(n) for _ in range(30))]:
            for places in (2, 4):
                exact = Fraction(100*c, n); unit = 10**places
                text = f"{int(exact*unit+Fraction(1, 2))/unit:.{places}f}"
                assert count_behind(text, n) | dict(implied=0) == dict(count=c, how="rounded", nearest=text, implied=0)
                cut = f"{int(exact*unit)/unit:.{places}f}"
                assert count_behind(cut, n)["count"] == c
    assert count_behind("50.01", 10)["how"] is None


def test_wrong_data_is_seen():
    good = audit()
    a = audit(changed("3", "Janus-Pro-1B", "Re-Align", "POPE_r", "87.51"))
    assert a["deltas"]["agree"] == 29 and len(a["counts"]["fail"]) == 6 and a["deltas"]["differ"][0]["equals"] == ""
    assert audit(changed("3", "LLaVA-v1.5-13B", "Re-Align", "POPE_a", "0.60", "printed_delta"))["deltas"]["agree"] == 31
    assert audit(changed("2", "LLaVA-v1.5-7B", "SIMA", "MMBench", "64.69"))["ranks"][0]["competition"] != good["ranks"][0]["competition"]
    assert list(audit(changed("4", "LLaVA-v1.5-7B", "baseline", "SQA", "66.11"))["repeats"]["differ"]) == [("LLaVA-v1.5-7B", "baseline", "SQA")]
    assert (good["repeats"]["tested"], good["repeats"]["differ"]) == (45, {})
    assert "66.11" in to_markdown(published(4, changed("4", "LLaVA-v1.5-7B", "baseline", "SQA", "66.11")))
    noted = published(1, changed("1", "LLaVA-v1.5-7B", "baseline", "POPE_r", "88.15"))           # a note comes with the cell it is about
    assert [x[:2] for x in noted.notes][:1] == [(0, "POPE_r")]


def test_average_rank():
    rows = [dict(x=3, y="1.0"), dict(x=3, y="2.0"), dict(x=1, y="2.00")]
    assert {t: average_rank(rows, t) for t in TIES} == {"competition": [2, 1, 2], "dense": [1.5, 1, 1.5], "average": [2.25, 1.5, 2.25]}
    assert average_rank(rows, lower=["x", "y"]) == [1.5, 2, 1.5]
    shuffled = random.Random(1).sample(range(3), 3)
    assert average_rank([rows[i] for i in shuffled]) == [average_rank(rows)[i] for i in shuffled]
    for bad, text in ((dict(ties="min"), "unknown rule"), (dict(rows=[]), "same columns"), (dict(rows=[dict(x=1), dict(x=1, y=2)]), "same columns")):
        with pytest.raises(ValueError, match=text): average_rank(**{"rows": rows} | bad)


# ---- tables as printed, figures

def test_cells_are_as_printed():
    for n in "1234":
        for shown, row in zip(published(n).rows, paper_data()["tables"][n]["rows"], strict=True):
            assert {c: shown[c] for c in row["cells"]} == row["cells"]
            assert {c: shown[c + " delta"] for c in row.get("printed_delta", {})} == row.get("printed_delta", {})
    assert [len(published(n).rows) for n in (5, 6)] == [7, 14]
    assert published(1).df().shape == (8, 10) and published(3).df().shape == (17, 8)
    with pytest.raises(ValueError, match="no Table 0"): published(0)


def test_figures():
    import matplotlib.pyplot as plt
    from realign_nb.plots import radar, radars, scale_axes
    scaled = [scale_axes(t) for t in figure1_panels().values()]
    keys = [f"{m}_{k}" for m in ("llava15", "llava16") for k in ("hallucination", "general")]
    for key, t in zip(keys, scaled, strict=True):
        for m, axes in paper_data()["figure1_minmax"][key].items(): assert list(t[m].values()) == pytest.approx(list(axes.values()), abs=6e-5)
    assert figure4_points() == [(11, .45), (16, 1.34)]
    figures = draw("figure1"); assert list(figures) == ["figure1", "figure1-raw"]
    assert [len(ax.lines) for ax in figures["figure1"].axes] == [5, 5, 3, 3]
    raw = figures["figure1-raw"].axes[1].lines[-1].get_ydata(); assert max(raw) <= 1 and raw[5] == pytest.approx(1511.79/RIM["MME P"])
    looks = {(l.get_label(), l.get_color(), l.get_marker()) for ax in figures["figure1"].axes for l in ax.lines}; assert len(looks) == 6           # a method looks the same everywhere
    flat = {m: dict(x=5., y=1.) for m in "ab"}; assert scale_axes(flat)["a"] == dict(x=.5, y=.5); radars(dict(one=flat)).canvas.draw()
    assert radar(dict(a=dict(x=0.), b=dict(x=0.)), scaled=False).lines[0].get_ydata()[0] == 0
    plt.close("all")


# ---- writers

NASTY = ["a_b & 100 %", "$x$ #1 {y} ~ ^", "[0.1, 0.2]", "<script>", "a|b", "back\\slash", "−0.1 – Δ"]


def nasty(): return Table("t", NASTY[0], dict(a=NASTY[4], b="b"), [dict(a=x, b="1") for x in NASTY], [(2, "b", NASTY[1]), (4, "b", NASTY[1]), (None, None, NASTY[3])])


def test_latex():
    text = to_latex(nasty()); body = text.split("\n", 1)[1]
    assert not re.search(r"(?<!\\)[%#_]", body) and "<" not in body and "|" not in body and "−" not in body
    assert not re.search(r"(?<!\\)&", body.replace(" & ", "")) and body.count(" & ") == 8                     # one per line: what separates cells
    assert not re.search(r"(?m)\\\\\s*\[", body) and not re.search(r"(?m)^\[", body) and "{[}0.1, 0.2{]}" in body
    assert body.count("{") - body.count(r"\{") == body.count("}") - body.count(r"\}")
    assert body.count(r"\textsuperscript{a}") == 3                                           # two cells, one note
    assert latex("back\\slash") == r"back\textbackslash{}slash" and latex("a\nb") == "a b"


def test_markdown_and_html():
    text = to_markdown(nasty()); rows = [l for l in text.splitlines() if l.startswith("|")]
    assert len(rows) == 2 + len(NASTY) and {len(re.findall(r"(?<!\\)\|", l)) for l in rows} == {3} and rows[1] == "| --- | --: |"
    assert r"\<script\>" in text and r"back\\slash" in text and text.count("<sup>a</sup>") == 3
    page = to_html(nasty()); assert "<script>" not in page and "&lt;script&gt;" in page and page.count("<tr>") == 1 + len(NASTY)
    assert nasty()._repr_html_() == page and str(nasty()) == text


# ---- ours

def pope(**more): return dict(benchmark="pope", rule="llava", scale="share", n=8910, metrics={"random/accuracy": .88007, "mean/f1": .8595}, intervals={"random/accuracy": [.868, .892]}, interval="95 %, by image", **more)


def test_ours_never_share_a_column():
    t = combine(published(3), [pope(backbone="LLaVA-v1.5-13B", method="baseline"), pope(model="tiny", arm="rdpo")])
    assert [(r["printed"], r["ours"], r["interval"], r["n"], r["rule"]) for r in t.rows] == [("88.07", "88.01", "86.80 – 89.20", "8910", "pope.llava"), ("", "88.01", "86.80 – 89.20", "8910", "pope.llava")]
    assert {"printed", "ours"} <= set(t.columns) and "95 %, by image" in to_latex(t).replace(r"\%", "%")
    assert combine(published(1), [pope() | dict(scale="percent", metrics={"random/accuracy": 88.007}, intervals=None)]).rows[0]["ours"] == "88.01"
    for s, text in ((pope() | dict(scale=None), "scale is None"), (pope() | dict(metrics={}), "belongs to a column")):
        with pytest.raises(ValueError, match=text): combine(published(1), [s])
    with pytest.raises(ValueError, match="none given"): combine(published(1), [])


def test_measured_names_are_those_of_the_scorers():
    from realign_nb.bench import FAMILIES, find_benchmark
    assert {b for b, _ in MEASURED.values()} == set(FAMILIES) - {"chair"}
    groups = dict(pope=["random", "popular", "adversarial"], mme=["existence", "color", "code_reasoning"], scienceqa=["all", "IMG"], mmvet=["total", "ocr"])
    for column, (benchmark, metric) in MEASURED.items():
        b, names = find_benchmark(benchmark), None
        for width in range(1, 20):                                  # as many counts per group as the scorer wants
            g = groups.get(benchmark, ["all"])
            try: names = b.metrics(g, np.ones((len(g), width))); break
            except (ValueError, IndexError): continue
        assert metric in names, (column, metric, list(names))
    assert set(MEASURED) == {c for n in "1234" for r in paper_data()["tables"][n]["rows"] for c in r["cells"]} - {"Avg_Rank"}


def test_command(tmp_path, capsys):
    lines = [pope(arm="rdpo", seed=s) for s in (0, 1, "all")]
    (tmp_path/"scores.jsonl").write_text("".join(json.dumps(x)+"\n" for x in lines)); (tmp_path/"one.json").write_text(json.dumps(pope(), indent=1))
    assert [s["seed"] for s in read_scores(tmp_path/"scores.jsonl")] == ["all"]
    assert main_tables(["3", "--ours", str(tmp_path/"one.json"), "--backbone", "LLaVA-v1.5-13B", "--method", "baseline"]) == 0
    out = capsys.readouterr().out; assert "| LLaVA-v1.5-13B | baseline | POPE r | 88.07 | 88.01 | 86.80 – 89.20 | 8910 | pope.llava |" in out
    assert main_tables(["1", "figure4", "--format", "svg", "png", "latex", "--out", str(tmp_path/"out")]) == 0
    assert sorted(p.name for p in (tmp_path/"out").iterdir()) == ["figure4.png", "figure4.svg", "figure4.tex", "table1.png", "table1.svg", "table1.tex"]
    assert main_tables(["all", "--ours", str(tmp_path/"scores.jsonl")]) == 0; out = capsys.readouterr().out
    assert out.count("Ours beside") == 3 and "30 of 33" in out and "of 161 percentages" in out                 # Tables 1, 3 and 4 have POPE
    for words in (["1", "--format", "png"], ["2", "--ours", str(tmp_path/"one.json")], ["1", "--ours", "nowhere.json"]): assert main_tables(words) == 2
    assert capsys.readouterr().err.count("error: ") == 3


def test_same_files_twice(tmp_path):
    for folder in "ab": assert main_tables(["2", "figure4", "--format", "svg", "png", "html", "--out", str(tmp_path/folder)]) == 0
    assert all(p.read_bytes() == (tmp_path/"b"/p.name).read_bytes() for p in (tmp_path/"a").iterdir())


def test_light():
    code = "import sys, realign_nb.tables, realign_nb.tables_cli; print(*[m for m in ('torch', 'pandas', 'matplotlib', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
