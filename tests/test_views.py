"""Objectives against closed forms and finite differences; second images against what they promise."""
import math
import pickle
import subprocess
import sys
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from realign_nb.core import ImageError, PreferencePair
from realign_nb.dpo import OBJECTIVES, STREAMS, LogpBatch, dpo, own_view, streams
from realign_nb.rdpo import (CLIP_PIXELS, VIEWS, Drawn, anchor, blank, diffuse, mask_patches, mdpo, pair_rng, random_crop, rdpo, signal_kept,
                             vdpo)

DRAWN = ("crop", "token_mask", "noise", "blank")


# ---- objectives

def softplus(t): return np.logaddexp(0, t)


def sigmoid(t): return np.exp(-softplus(-np.asarray(t)))


def numbers(n=7, scale=30., view="crop", seed=0):
    "Random log-probs in float64; the policy's want a gradient"
    gen, names = torch.Generator().manual_seed(seed), ("w", "l", f"w@{view}")
    policy, reference = ({s: scale*torch.randn(n, generator=gen, dtype=torch.float64)-90 for s in names} for _ in range(2))
    return LogpBatch({s: v.requires_grad_() for s, v in policy.items()}, reference)


def ratios(batch): return [batch.ratio(s).detach().numpy() for s in batch.policy]


def by_formula(name, batch, beta, weights, delta):
    "Losses and slopes with numpy, from the equations"
    w, l, c = ratios(batch)
    terms = [softplus(-beta*(w-l)), softplus(-beta*(w-c)), softplus(delta-beta*w)]
    pulls = [beta*sigmoid(-beta*(w-l)), beta*sigmoid(-beta*(w-c)), beta*sigmoid(delta-beta*w)]
    a, b, k = {"dpo": (1, 0, 0), "vdpo": (0, 1, 0), "rdpo": (*weights[:2], 0), "mdpo": weights}[name]
    return a*terms[0]+b*terms[1]+k*terms[2], dict(zip(batch.policy, (-(a*pulls[0]+b*pulls[1]+k*pulls[2]), a*pulls[0], b*pulls[1])))


def call(name, batch, beta=.1, weights=(1., 1., 1.), delta=0.):
    hyper = {"dpo": {}, "vdpo": dict(view="crop"), "rdpo": dict(view="crop", weights=weights[:2]), "mdpo": dict(weights=weights, delta=delta)}
    return OBJECTIVES[name](batch, beta=beta, **hyper[name])


@pytest.mark.parametrize("name", ["dpo", "vdpo", "rdpo", "mdpo"])
@pytest.mark.parametrize("beta, weights, delta", [(.1, (1., 1., 1.), 0.), (.5, (.3, 2., .7), 1.5), (.1, (0., 1., 4.), -2.)])
def test_losses_and_slopes_are_the_formulas(name, beta, weights, delta):
    batch = numbers()
    loss = call(name, batch, beta, weights, delta)
    value, slope = by_formula(name, batch, beta, weights, delta)
    np.testing.assert_allclose(loss.detach(), value, rtol=1e-12)
    grads = torch.autograd.grad(loss.sum(), list(batch.policy.values()), allow_unused=True)
    for s, g in zip(batch.policy, grads): np.testing.assert_allclose(0 if g is None else g, slope[s], rtol=1e-10, atol=1e-300)


@pytest.mark.parametrize("name", ["dpo", "vdpo", "rdpo", "mdpo"])
def test_slopes_are_finite_differences(name):
    batch = numbers(3, scale=8.)
    def loss(*values): return call(name, LogpBatch(dict(zip(batch.policy, values)), batch.reference), .3, (.6, 1.7, .9), .4)
    assert torch.autograd.gradcheck(loss, tuple(batch.policy.values()))


def test_zero_ratios_are_coin_flips():
    batch = numbers()
    same = LogpBatch(batch.reference, batch.reference)
    for name, n in dict(dpo=1, vdpo=1, rdpo=2, mdpo=3).items():
        np.testing.assert_allclose(call(name, same), n*math.log(2), rtol=1e-14)
    np.testing.assert_allclose(mdpo(same, delta=1.5), 2*math.log(2)+softplus(1.5), rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["dpo", "vdpo", "rdpo", "mdpo"])
def test_extremes_stay_finite(name, dtype):
    "Margins of 1e5 nats either way: linear on one side, 0 on the other, slopes at most beta per term"
    w = torch.tensor([1e5, -1e5, 0., 0.], dtype=dtype)
    policy = dict(w=w, l=torch.tensor([0., 0., 1e5, -1e5], dtype=dtype), **{"w@crop": torch.tensor([0., 0., 1e5, -1e5], dtype=dtype)})
    batch = LogpBatch({s: v.requires_grad_() for s, v in policy.items()}, {s: torch.zeros(4, dtype=dtype) for s in policy})
    loss = call(name, batch)
    grads = torch.autograd.grad(loss.sum(), list(policy.values()), allow_unused=True)
    halves, extra = dict(dpo=1, vdpo=1, rdpo=2, mdpo=2)[name], name=="mdpo"
    want = [0., 1e4*(halves+extra), 1e4*halves+extra*math.log(2), extra*math.log(2)]
    np.testing.assert_allclose(loss.detach(), want, rtol=1e-6)
    for g in grads: assert g is None or (g.isfinite().all() and g.abs().max()<=.1*(halves+extra)+1e-6)
    np.testing.assert_allclose(0 if grads[0] is None else grads[0][1], -.1*(halves+extra), rtol=1e-6)


def test_mdpo_is_its_three_terms_and_a_weight_is_one_term():
    batch = numbers(view="noise", seed=3)
    terms = [dpo(batch, .2), vdpo(batch, .2, "noise"), anchor(batch, .2, .5)]
    np.testing.assert_allclose(mdpo(batch, .2, "noise", delta=.5).detach(), sum(terms).detach(), rtol=1e-14)
    for i, t in enumerate(terms):
        unit = [float(j==i) for j in range(3)]
        assert torch.equal(mdpo(batch, .2, "noise", unit, .5), t)
        if i<2: assert torch.equal(rdpo(batch, .2, "noise", unit[:2]), t)
    assert torch.equal(mdpo(batch, .2, "noise", [1., 1., 0.]), rdpo(batch, .2, "noise"))


def test_the_anchor_looks_at_w_alone_and_wants_it_up():
    def loss(w, l=0., c=0., **kw):
        one = torch.ones(1, dtype=torch.float64)
        return anchor(LogpBatch(dict(w=w*one, l=l*one, **{"w@crop": c*one}), dict.fromkeys(("w", "l", "w@crop"), 0*one)), **kw).item()
    assert loss(5.)<loss(0.)<loss(-5.) and loss(0.)==pytest.approx(math.log(2))
    assert loss(3., l=9., c=-9.)==loss(3.) and loss(3., delta=1.)>loss(3.)
    assert loss(20., beta=.1, delta=2.)==pytest.approx(math.log(2))


@pytest.mark.parametrize("f, weights", [(rdpo, (1., 1., 1.)), (rdpo, (1.,)), (mdpo, (1., 1.))])
def test_a_weight_too_few_or_too_many(f, weights):
    with pytest.raises(ValueError, match=f"{len(weights)} weights for {3 if f is mdpo else 2} terms.*one number per term"):
        f(numbers(), view="crop", weights=weights)


def test_streams_and_own_views():
    assert {o: own_view(o) for o in ("dpo", "sft", "vdpo", "rdpo", "mdpo")}=={"dpo": "retrieved", "sft": "retrieved", "vdpo": "retrieved",
                                                                            "rdpo": "retrieved", "mdpo": "crop"}
    assert streams("mdpo")==("w", "l", "w@crop") and streams("rdpo")==("w", "l", "w@retrieved") and streams("dpo")==("w", "l")
    assert streams("mdpo", "blank")==("w", "l", "w@blank") and streams("vdpo", "noise")==("w", "w@noise")
    with pytest.raises(ValueError, match="'w@crop' is missing in policy"): mdpo(numbers(view="retrieved"))


def test_an_objective_reads_no_other_streams():
    class Seen(dict):
        def __getitem__(self, k): seen.add(k); return super().__getitem__(k)
    for name in ("dpo", "vdpo", "rdpo", "mdpo"):
        batch, seen = numbers(), set()
        call(name, LogpBatch(Seen(batch.policy), Seen(batch.reference)))
        assert seen==set(streams(name, "crop"))


def test_mdpo_is_found_without_importing_its_module():
    code = "import sys; from realign_nb.dpo import streams; assert 'realign_nb.rdpo' not in sys.modules; print(streams('mdpo'))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()=="('w', 'l', 'w@crop')"


def test_a_new_objective_is_one_function():
    def hinge(batch, beta=.1, view="noise"): return (1-beta*(batch.ratio("w")-batch.ratio(f"w@{view}"))).clamp(min=0)
    OBJECTIVES["hinge"], STREAMS["hinge"] = hinge, ("w", "w@{view}")
    try:
        assert streams("hinge")==("w", "w@noise") and own_view("hinge")=="noise"
        with pytest.raises(ValueError, match="use one of dpo, hinge, mdpo, rdpo, sft, vdpo"): streams("hinged")
    finally: del OBJECTIVES["hinge"], STREAMS["hinge"]


# ---- views

def photo(w=96, h=64, seed=0):
    "No two pixels alike, so that nothing goes unseen"
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))


def pair(i, image=None): return PreferencePair(f"r{i}", "What is it?", image or photo(seed=i), photo(seed=100+i), "a", "b", "[MASK]")


PAIRS = [pair(i) for i in range(6)]


def same(a, b): return (a.size, a.mode, a.tobytes())==(b.size, b.mode, b.tobytes())


@pytest.mark.parametrize("view", DRAWN)
def test_a_draw_depends_on_seed_id_and_picture_only(view):
    f, one = VIEWS[view], VIEWS[view](PAIRS, 3)[2]
    assert same(one, f(PAIRS, 3)[2]) and same(one, f(PAIRS[::-1], 3)[3]) and same(one, f([PAIRS[2]], 3)[0])
    drawn = f(PAIRS, 3)
    for i in (5, 0, 2, 2): again = drawn[i]                                        # other draws in between, twice in a row
    assert same(one, again) and same(one, drawn[2:4][0]) and same(one, drawn[-4]) and same(one, list(drawn)[2])
    renamed = PreferencePair("other", *list(vars(PAIRS[2]).values())[1:])
    others = [f(PAIRS, 4)[2], f([renamed], 3)[0], f([pair(2, photo(seed=77))], 3)[0]]  # another seed, id, picture
    assert [same(one, o) for o in others]==[view=="blank"]*3
    assert same(one, f([PreferencePair("r2", "x", PAIRS[2].image, PAIRS[0].image, "c", "d", "e")], 3)[0])   # texts do not matter


@pytest.mark.parametrize("view", DRAWN)
@pytest.mark.parametrize("size", [(2, 2), (7, 5), (24, 500), (500, 24), (333, 251)])
def test_size_and_mode_stay(view, size):
    for im in (photo(*size), photo(*size).convert("L"), photo(*size).convert("CMYK")):
        out = VIEWS[view]([pair(0, im)], 1)[0]
        assert out.size==size and out.mode=="RGB"


def test_files_are_read_late_turned_upright_and_left_alone(tmp_path):
    exif = Image.Exif(); exif[274] = 6                                                 # lying on its side
    photo(40, 30).save(tmp_path/"a.png", exif=exif)
    for view in DRAWN:
        assert VIEWS[view]([pair(0, str(tmp_path/"a.png"))])[0].size==(30, 40)
        lazy = VIEWS[view]([pair(0, str(tmp_path/"missing.png"))])
        with pytest.raises(ImageError, match="missing.png: no such image file"): lazy[0]
    source = photo(); before = source.tobytes()
    for view in DRAWN: VIEWS[view]([pair(0, source)])[0]
    Drawn([pair(0, source)], draw=lambda im, rng: (im.paste((0, 0, 0), (0, 0, 50, 50)), im)[1])[0]    # a draw that paints over its input
    assert source.tobytes()==before


def test_nothing_is_kept(tmp_path):
    "Eleven thousand pairs cost nothing, and a picture that was handed out is gone when its taker drops it"
    photo(336, 336).save(tmp_path/"a.png")
    many = [PreferencePair(f"r{i}", "x", str(tmp_path/"a.png"), str(tmp_path/"a.png"), "c", "d", "e") for i in range(11_000)]
    for view in DRAWN:
        drawn = VIEWS[view](many)
        im = drawn[10_999]; gone = weakref.ref(im); del im
        assert gone() is None and len(drawn)==11_000 and len(pickle.dumps(drawn[:1]))<2_000
        assert repr(drawn).startswith("Drawn(11000 pairs, ") and len(repr(drawn))<60
        with pytest.raises(IndexError): drawn[11_000]


def test_workers_draw_the_same():
    for view in DRAWN: assert same(pickle.loads(pickle.dumps(VIEWS[view](PAIRS, 5)))[1], VIEWS[view](PAIRS, 5)[1])


def test_seeds_and_ids_do_not_run_into_each_other():
    first = [pair_rng(s, i).random() for s, i in ((1, "2 3"), ("1 2", "3"), (0, "a"), (0, "b"), (1, "a"), ("0/7", "a"))]
    assert first[0]==first[1] and len(set(first[1:]))==5            # only a seed with a space in it could collide; numbers cannot
    assert pair_rng(0, "a").random()==pair_rng(np.int64(0), "a").random()


def windows(n, **kw):
    "Where n crops lie, read off a map: column in red, row in green"
    x, y = np.meshgrid(np.arange(250), np.arange(200))
    chart = Image.fromarray(np.stack([x, y, 0*x], -1).astype(np.uint8))
    return np.array([[v for a in random_crop(chart, pair_rng(0, str(i)), **kw).getextrema()[:2] for v in a] for i in range(n)])


def test_crop_is_a_random_resized_crop():
    x0, x1, y0, y1 = windows(600).T
    w, h = x1-x0+1, y1-y0+1
    area, shape = w*h/(250*200), np.log(w/h)/np.log(4/3)
    assert .009<area.min()<.02 and .19<area.max()<.205 and abs(area.mean()-.105)<.007     # uniform on 0.01 to 0.2
    assert abs(np.mean(area<.105)-.5)<.06 and abs(area.std()-.19/math.sqrt(12))<.004
    assert -1.15<shape.min()<-.9 and .9<shape.max()<1.15 and abs(shape.mean())<.07 and abs(shape.std()-1/math.sqrt(3))<.05
    for start, length, full in ((x0, w, 250), (y0, h, 200)):                            # the place is uniform over what is possible
        place = start/(full-length)
        assert place.min()<.02 and place.max()>.98 and abs(place.mean()-.5)<.04 and abs(place.std()-1/math.sqrt(12))<.025
    assert abs(np.corrcoef(x0, y0)[0, 1])<.12 and abs(np.corrcoef(area, shape)[0, 1])<.12


def test_crop_shows_its_window_and_nothing_else():
    for x0, x1, y0, y1 in windows(40, scale=(.25, .25), ratio=(1, 1)):
        assert (x1-x0+1, y1-y0+1)==(112, 112)
    for x0, x1, y0, y1 in windows(5, scale=(.1, .1), ratio=(2, 2)): assert (x1-x0+1, y1-y0+1)==(100, 50)   # ratio: width to height
    half, touching = Image.new("RGB", (250, 200)), 0; half.paste((250, 250, 250), (0, 0, 125, 200))
    for i, (x0, x1, _, _) in enumerate(windows(400, scale=(.01, .01), ratio=(1, 1))):
        seen = np.array(random_crop(half, pair_rng(0, str(i)), scale=(.01, .01), ratio=(1, 1)))
        if x0>=125: assert seen.max()==0; touching += x0==125                             # nothing leaks in from outside the window
        elif x1<125: assert seen.min()==250; touching += x1==124
    assert touching>1


def test_crop_of_a_strip_keeps_its_area():
    strip = Image.fromarray(np.tile(np.arange(2000)[None, :, None]//8, (20, 1, 3)).astype(np.uint8))
    widths = [np.ptp(np.array(random_crop(strip, pair_rng(0, str(i)), scale=(.1, .1)))[..., 0])*8 for i in range(20)]
    assert all(185<=w<=230 for w in widths)                                              # 20 high at most, so 200 wide


@pytest.mark.parametrize("kw, cell, hidden", [(dict(), 14, 115), (dict(grid=(6, 6)), 56, 7), (dict(share=.5, grid=(12, 24)), None, 144),
                                              (dict(share=0), 14, 0), (dict(share=1), 14, 576)])
def test_token_mask_hides_whole_patches(kw, cell, hidden):
    rows, cols = kw.get("grid", (24, 24)); im = photo(336, 336); a = np.array(im)
    def gone(i, **more): return (np.array(mask_patches(im, pair_rng(0, i), **kw, **more))!=a).any(-1)
    patches = gone("a").reshape(rows, 336//rows, cols, 336//cols).mean((1, 3))
    assert (patches>.9).sum()==hidden and (patches==0).sum()==rows*cols-hidden           # noise may hit the mean colour by chance
    out = np.array(mask_patches(im, pair_rng(0, "a"), **kw))
    if hidden: assert (out[gone("a")]==a.mean((0, 1)).round()).all()
    black = np.array(mask_patches(im, pair_rng(0, "a"), fill=(1, 2, 3), **kw))
    assert (black==(1, 2, 3)).all(-1).reshape(rows, 336//rows, cols, 336//cols).all((1, 3)).sum()==hidden


def test_token_mask_takes_the_mean_colour():
    two = Image.new("RGB", (48, 48), (200, 100, 0)); two.paste((100, 20, 255), (0, 0, 24, 48))
    assert {c for _, c in mask_patches(two, pair_rng(0, "a")).getcolors()}=={(200, 100, 0), (100, 20, 255), (150, 60, 128)}


def test_token_mask_hides_every_patch_equally_often():
    white = Image.new("RGB", (24, 24), "white")
    often = sum((np.array(mask_patches(white, pair_rng(0, str(i)), fill=(0, 0, 0)))[..., 0]==0).astype(int) for i in range(500))/500
    assert abs(often.mean()-115/576)<1e-12 and often.min()>.12 and often.max()<.28
    assert abs(np.corrcoef(often[:-1].ravel(), often[1:].ravel())[0, 1])<.15
    small = np.array(mask_patches(photo(5, 3), pair_rng(0, "a")))                         # fewer pixels than patches
    assert small.shape==(3, 5, 3)


def test_noise_has_the_strength_of_its_step():
    rates = [1e-5+(5e-3-1e-5)/(1+math.exp(6-12*i/999)) for i in range(1000)]
    for k in (0, 1, 500, 999): assert signal_kept(k)==pytest.approx(math.prod(1-b for b in rates[:k+1]), rel=1e-12)
    mean, std = CLIP_PIXELS*255
    for step in (250, 500):
        kept, level = signal_kept(step), mean+.3*std
        im = Image.new("RGB", (300, 300), tuple(int(v) for v in level.round()))
        x = (np.array(diffuse(im, pair_rng(0, "a"), step=step))-mean)/std
        np.testing.assert_allclose(x.mean((0, 1)), .3*math.sqrt(kept), atol=.02)          # the picture fades towards the mean
        np.testing.assert_allclose(x.std((0, 1)), math.sqrt(1-kept), rtol=.02)
        c = np.corrcoef(x.reshape(-1, 3).T)
        assert abs(c[0, 1])<.02 and abs(c[0, 2])<.02 and abs(c[1, 2])<.02                 # each channel has noise of its own
        assert abs(np.corrcoef(x[:-1, :, 0].ravel(), x[1:, :, 0].ravel())[0, 1])<.02
    white, black = (np.array(diffuse(Image.new("RGB", (50, 50), c), pair_rng(0, "a"), step=9)).astype(int) for c in ("white", "black"))
    assert 230<white.min()<255==white.max() and black.min()==0<black.max()<25             # cut off, not wrapped round
    assert same(VIEWS["noise"](PAIRS, 2)[1], diffuse(PAIRS[1].image, pair_rng(2, "r1"), step=500))


def test_blank_and_retrieved():
    assert blank(photo(9, 8), None).getcolors()==[(72, (128, 128, 128))]
    assert all(a is b.retrieved_image for a, b in zip(VIEWS["retrieved"](PAIRS), PAIRS))
    lost = [pair(0)]; lost[0].retrieved_image = "not/opened.png"
    assert VIEWS["retrieved"](lost)==["not/opened.png"]


def test_random_view_avoids_own_and_retrieved():
    ring = [PreferencePair(str(i), "x", PAIRS[i%4].image.copy(), PAIRS[(i+1)%4].image, "a", "b", "[MASK]") for i in range(40)]
    drawn = VIEWS["random"](ring, 1)
    for p, im in zip(ring, drawn): assert not same(im, p.image) and not same(im, p.retrieved_image)
    assert len({im.tobytes() for im in drawn})==4 and [im.tobytes() for im in drawn]==[im.tobytes() for im in VIEWS["random"](ring, 1)]
    with pytest.raises(ValueError, match="record 0: no third picture"): VIEWS["random"](ring[:1])


def test_settings_out_of_range():
    for share in (-.1, 20):
        with pytest.raises(ValueError, match="give a fraction between 0 and 1"): mask_patches(photo(), pair_rng(0, "a"), share=share)
    for step in (-1, 1000):
        with pytest.raises(ValueError, match="use one of 0 to 999"): diffuse(photo(), pair_rng(0, "a"), step=step)


def test_a_new_view_is_one_function():
    def turn(image, rng): return image.transpose(Image.Transpose.ROTATE_180) if rng.random()<.5 else image
    VIEWS["turn"], VIEWS["weak"] = partial(Drawn, draw=turn), partial(Drawn, draw=partial(mask_patches, share=.1))
    try:
        turned = [not same(im, p.image) for p, im in zip([pair(i) for i in range(20)], VIEWS["turn"]([pair(i) for i in range(20)]))]
        assert 3<sum(turned)<17 and repr(VIEWS["weak"](PAIRS, 2))=="Drawn(6 pairs, mask_patches, seed=2)"
    finally: del VIEWS["turn"], VIEWS["weak"]


def test_every_view_becomes_rows():
    "What the collator does: one view for the set, second images by index"
    from realign_nb.rows import flat_rows
    from realign_nb.tinyvlm import build
    processor = build(seed=0)[1]
    ring = [PreferencePair(str(i), "What is it?", PAIRS[i].image, PAIRS[i-1].image, "a dog", "a cat", "[MASK]") for i in range(4)]
    for view, f in VIEWS.items():
        second = f(ring, 7)
        batch = flat_rows([ring[2], ring[0]], processor, view, streams("mdpo", view), [second[2], second[0]])
        alone = flat_rows([ring[0]], processor, view, streams("mdpo", view), f(ring, 7)[:1])
        pixels = dict(zip(batch["streams"], batch["pixel_values"].chunk(3)))
        assert batch["streams"]==("w", "l", f"w@{view}") and torch.equal(pixels["w"], pixels["l"])
        assert not torch.equal(pixels[f"w@{view}"][1], pixels["w"][1])
        assert torch.equal(pixels[f"w@{view}"][1:], alone["pixel_values"][-1:])
