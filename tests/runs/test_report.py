"""The report at the end of stage 2: its figures against plain loops, its verdicts at their thresholds, its files."""

import json

import gymnasium as gym
import imageio.v3
import numpy as np
import pytest
import torch
from helpers import TINY, random_rows, random_states, save_tiny_draw

import redraw_adapt
from common import DRAW, kl_categorical, load_checkpoint, sample_onehot, save_checkpoint, save_dataset
from draw_pretrain import PRESETS, source_range, world_model_loss
from redraw_adapt import DRIFT, PLATEAU, Rectified, diagnose, encode_dataset, open_loop, picture, report, verdicts, where_it_acts, windows

HOME = {"kl": 2.0, "image error": [0.1, 0.2, 0.4], "vector error": [0.0, 0.01, 0.1], "posterior entropy": [1.0, 2.0, 3.0]}


def trained(draw, method="residual"):
    """A Rectified whose residual is not zero"""
    rectified = Rectified(draw, method, hidden=8)
    torch.nn.init.normal_(rectified.delta[0][-1].weight)
    return rectified.requires_grad_(False)


# ---- stage 1's part


def test_source_range_is_that_of_the_loss():
    """On one batch: the KL of the world model's own loss, and quantiles of one frame's figures"""
    draw = DRAW(TINY).requires_grad_(False)
    rows = random_rows(60) | {"reward": np.zeros(60, np.float32)}
    data = {k: torch.from_numpy(v).unflatten(0, (5, 12)) for k, v in rows.items()}
    torch.manual_seed(3)
    home = source_range(draw, [data])
    torch.manual_seed(3)
    _, metrics, (embed, z, _) = world_model_loss(draw, data, PRESETS["laptop"][1], soft=0.0)  # the same sample of z
    assert home["kl"] == pytest.approx(metrics["world_model/kl"].item(), rel=1e-5)
    entropy, image, vector = [], [], []
    for b in range(5):
        for t in range(12):
            q = draw.posterior(embed[b, t]).exp().numpy()
            entropy.append(-(q * np.log(q)).sum())
            code = z[b, t].flatten()[None]
            image.append(((draw.decoder(code)[0].numpy() - rows["image"][12 * b + t] / 255) ** 2).sum())
            true = rows["vector"][12 * b + t]
            vector.append(((draw.vector_head(code)[0].numpy() - np.sign(true) * np.log1p(np.abs(true))) ** 2).sum())
    for name, values in (("image error", image), ("vector error", vector), ("posterior entropy", entropy)):
        assert home[name] == pytest.approx(np.quantile(values, [0.01, 0.5, 0.99]).tolist(), rel=1e-4)


# ---- the figures


def test_windows_stay_inside_an_episode():
    lengths = [100, 3, 60, 41, 41, 82, 7]
    is_first = np.zeros(sum(lengths), bool)
    is_first[np.cumsum([0, *lengths[:-1]])] = True
    episode = np.cumsum(is_first) - 1
    rows = np.flatnonzero(episode != 3)  # an episode in the middle is kept out
    t = windows(rows, is_first)
    assert t.shape == (2 + 1 + 1 + 2, 41) and np.isin(t, rows).all()
    assert (np.diff(t) == 1).all() and (episode[t] == episode[t[:, :1]]).all()
    assert t[:, 0].tolist() == [0, 41, 103, 204, 245, 286]
    assert windows(rows, is_first, most=4)[:, 0].tolist() == [0, 103, 245]  # every other one
    assert windows(np.flatnonzero(episode == 6), is_first).shape == (1, 7)  # as far as the data goes


@pytest.mark.parametrize("method", ["residual", "none"])
def test_open_loop_is_a_plain_loop(method):
    draw = DRAW(TINY).requires_grad_(False)
    torch.nn.init.normal_(draw.initial_logits)
    rectified = trained(draw) if method == "residual" else Rectified(draw)
    z, _, _ = random_states(4)
    action = torch.rand(4, 6, 1) * 2 - 1
    torch.manual_seed(5)
    zs = open_loop(draw, z, action, rectified, rectified.prior)
    torch.manual_seed(5)
    sigma = draw.observe(z[:, None], action[:, :1], torch.ones(4, 1, dtype=torch.bool), rectified)[:, 0].softmax(-1)
    assert torch.equal(zs[:, 0], z)
    for t in range(6):
        sigma = rectified(z, sigma, action[:, t]).softmax(-1)
        z = sample_onehot(sigma if method == "residual" else 0.99 * sigma + 0.01 / TINY.K)
        assert torch.equal(zs[:, t + 1], z)


def test_where_it_acts():
    draw = DRAW(TINY).requires_grad_(False)
    base, rectified = Rectified(draw), trained(draw)
    z, _, action = random_states(5, 7)
    acts = where_it_acts(draw, base, rectified, z, action)
    # A plain loop over the same belief
    total, sigma = 0.0, rectified(*draw.initial(5), torch.zeros(5, 1)).softmax(-1)
    for t in range(1, 7):
        u, f = (dynamics(z[:, t - 1], sigma, action[:, t - 1]) for dynamics in (rectified, base))
        total, sigma = total + kl_categorical(f.log_softmax(-1), u.log_softmax(-1)).mean() / 6, u.softmax(-1)
    assert acts.shape == (TINY.S,) and acts.min() > 0 and acts.sum().item() == pytest.approx(total.item(), rel=1e-4)
    assert not where_it_acts(draw, base, base, z, action).any()
    # A residual on variable 1 alone
    rectified.delta[0][-1].weight.view(TINY.S, TINY.K, -1)[[0, 2]] = 0.0
    acts = where_it_acts(draw, base, rectified, z, action)
    assert acts[1] > 0.01 and acts[[0, 2]].abs().max() < 1e-6


@pytest.fixture
def data():
    """An untrained model, its residual, a dataset of two episodes of 30 rows, the second one held out, and its posterior"""
    draw = DRAW(TINY).requires_grad_(False)
    rows = random_rows(60)
    return draw, Rectified(draw), trained(draw), rows, encode_dataset(draw, rows, "cpu"), np.arange(30, 60)


def test_open_loop_error(monkeypatch, data):
    """If the rollouts were the latents of `fixed`, the errors would be those of their pictures, at the right steps."""
    draw, base, rectified, rows, posterior, held_out = data
    fixed = {dynamics: random_states(1, 30)[0] for dynamics in (base, rectified)}
    monkeypatch.setattr(redraw_adapt, "open_loop", lambda draw, z, action, dynamics, prior: fixed[dynamics])
    figures, film = diagnose(draw, base, rectified, rows, posterior, held_out, None)
    assert figures["steps"] == [1, 5, 15, 29] and figures["windows"] == 1
    assert torch.allclose(film[0, 0], torch.from_numpy(rows["image"][30:] / 255.0).float())
    for i, (name, dynamics) in enumerate((("base", base), ("rectified", rectified)), 1):
        for k, step in enumerate(figures["steps"]):
            code = fixed[dynamics][0, step].flatten()[None]
            image, vector = draw.decoder(code)[0].numpy(), draw.vector_head(code)[0].numpy()
            true = rows["vector"][30 + step]
            assert figures["open_loop"][name]["image error"][k] == pytest.approx(((image - rows["image"][30 + step] / 255) ** 2).sum(), rel=1e-4)
            assert figures["open_loop"][name]["vector error"][k] == pytest.approx(((vector - np.sign(true) * np.log1p(np.abs(true))) ** 2).sum(), rel=1e-4)
            assert np.allclose(film[i, 0, step], image, atol=1e-5)


def test_same_dynamics_have_the_same_error(data):
    """Both get the same chances, so a difference in the report is never one of luck alone; and the generators stay as they are."""
    draw, base, rectified, rows, posterior, held_out = data
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    (same, _), (other, _) = (diagnose(draw, base, dynamics, rows, posterior, held_out, None) for dynamics in (Rectified(draw), rectified))
    assert same["open_loop"]["rectified"] == same["open_loop"]["base"] == other["open_loop"]["base"] != other["open_loop"]["rectified"]
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


def test_frames_beside_the_source(data):
    draw, base, rectified, rows, posterior, held_out = data
    entropy = -(posterior.exp() * posterior).sum((-2, -1)).numpy()
    home = {"image error": [0.0, 1.0, 1e9], "vector error": [1e8, 1e8, 1e9], "posterior entropy": np.quantile(entropy, [0.25, 0.5, 0.8]).tolist()}
    frames = diagnose(draw, base, rectified, rows, posterior, held_out, home)[0]["frames"]
    shares = {name: (v["below"], v["above"]) for name, v in frames.items()}
    assert shares["image error"] == (0, 0) and shares["vector error"] == (1, 0)
    assert shares["posterior entropy"] == pytest.approx((0.25, 0.2), abs=1e-6)
    assert frames["posterior entropy"]["median"] == pytest.approx(np.median(entropy), rel=0.05)


# ---- the verdicts


def made_up(held_out=2.0, train=2.0, above=0.01, which="image error", below=0.01, source=HOME):
    """Figures of a healthy adaptation, and what is put wrong"""
    frames = {k: {"median": 0.2, "below": 0.01, "above": 0.01} for k in ("image error", "vector error", "posterior entropy")}
    frames[which] |= {"above": above, "below": below}
    return {
        "episodes": 9, "rows": 900, "update": 100, "source": source, "windows": 3, "steps": [1, 5, 15, 39], "acts": [0.5, 0.0, 1.5],
        "before": {"train": 9.0, "held-out": 9.0}, "last": {"train": train, "held-out": held_out}, "best": {"train": train, "held-out": held_out},
        "open_loop": {name: {"image error": [1.0] * 4, "vector error": [0.1] * 4} for name in ("base", "rectified")}, "frames": frames,
    }  # fmt: skip


LIMIT = PLATEAU * HOME["kl"]


@pytest.mark.parametrize(
    "figures, method, words",
    [
        (made_up(), "residual", ["HEALTHY"]),
        (made_up(held_out=LIMIT - 0.01, train=LIMIT - 0.01), "residual", ["HEALTHY"]),
        (made_up(held_out=LIMIT + 0.01, train=LIMIT + 0.01), "residual", ["CAPACITY PLATEAU", "--hidden", "--updates"]),
        (made_up(held_out=LIMIT + 0.01, train=1.0), "residual", ["CAPACITY PLATEAU", "overfitted", "more target data"]),
        (made_up(held_out=LIMIT + 0.01, train=LIMIT + 0.01), "none", ["CAPACITY PLATEAU", "--method residual"]),
        (made_up(held_out=float("nan")), "residual", ["CAPACITY PLATEAU"]),
        (made_up(above=DRIFT - 0.01), "residual", ["HEALTHY"]),
        (made_up(above=DRIFT + 0.01), "residual", ["VISUAL DRIFT", "image error in", "latents hardly suffer", "camera"]),
        (made_up(below=0.9), "residual", ["HEALTHY"]),  # easier to draw than the source's frames
        (made_up(below=0.9, which="posterior entropy"), "residual", ["VISUAL DRIFT", "posterior entropy in 90%"]),
        (made_up(above=0.9, which="posterior entropy"), "residual", ["VISUAL DRIFT", "posterior entropy in 90%"]),
        (made_up(above=0.9, which="vector error"), "residual", ["VISUAL DRIFT", "vector error in 90%", "units"]),
        (made_up(held_out=9.0, train=9.0, source=None, above=0.9), "residual", ["NO VERDICT"]),
    ],
)
def test_verdicts(figures, method, words):
    (verdict,) = verdicts(figures, method)
    assert verdict.startswith(words[0]) and all(w in verdict for w in words)
    assert "hardly suffer" not in verdict or "posterior entropy" not in words[1]
    text = report(figures, method)
    assert " ".join(verdict.split()) in " ".join(text.split()) and max(map(len, text.splitlines())) <= 120


def test_both_verdicts():
    drift, plateau = verdicts(made_up(held_out=9.0, train=9.0, above=0.9), "residual")
    assert drift.startswith("VISUAL DRIFT") and "hardly suffer" not in drift
    assert plateau.startswith("CAPACITY PLATEAU") and "--hidden" not in plateau and "drift" in plateau  # no wrong track


def test_page_of_figures():
    text = report(made_up(), "residual")
    assert "2 of 3 variables hold 90 %" in text and "2 (75%), 0 (25%), 1 (0%)" in text
    assert [line.split()[-4:] for line in text.splitlines() if line.startswith("open loop")] == [["1", "5", "15", "39"]]


# ---- the files


def test_picture():
    frames = torch.zeros(3, 5, 16, 16, 3)
    frames[1, 2], frames[2, 4] = 0.5, 7.0  # beyond white
    image = picture(frames)
    assert image.shape == (3 * 98, 64 + 5 * 98, 3) and image.dtype == np.uint8
    cells = image[:, 64:].reshape(3, 98, 5, 98, 3)
    assert (cells[:, :2] == 255).all() and (cells[:, :, :, :2] == 255).all()  # the lines between them
    inner = cells[:, 2:, :, 2:]
    assert (inner[1, :, 2] == 127).all() and (inner[2, :, 4] == 255).all() and inner[0].max() == 0
    assert all((image[i * 98 : (i + 1) * 98, :64] < 128).any() for i in range(3))  # a label for each row


def adapt(tmp_path, rows, source=HOME, run="run", **flags):
    """Stage 2 with an untrained model; returns its run folder"""
    torch.manual_seed(1)
    checkpoint = load_checkpoint(save_tiny_draw(tmp_path / "draw.pt"), ("draw_pretrain",))
    save_checkpoint(tmp_path / "draw.pt", **checkpoint, **({"source_range": source} if source else {}))
    save_dataset(tmp_path / "data.npz", rows)
    options = {"hidden": 8, "updates": 30, "batch": 4, "length": 5, "log_every": 10, "holdout": 0.5} | flags
    redraw_adapt.main(redraw_adapt.Args(str(tmp_path / "draw.pt"), str(tmp_path / "data.npz"), run_dir=str(tmp_path / run), device="cpu", **options))
    return tmp_path / run


@pytest.mark.parametrize("method", ["residual", "replace", "finetune", "none"])
@pytest.mark.parametrize("source", [HOME, None])
def test_files_of_a_run(tmp_path, capsys, method, source):
    rows = random_rows(60)
    folder = adapt(tmp_path, rows, source, method=method)
    result, text = json.loads((folder / "result.json").read_text()), (folder / "report.txt").read_text()
    assert text in capsys.readouterr().out
    assert result["verdicts"][0].split(":")[0] in text and ("NO VERDICT" in text) == (source is None)
    assert len(result["acts"]) == TINY.S and result["steps"] == [1, 5, 15, 29] and result["rows"] == 60
    best = load_checkpoint(folder / "best.pt", ("redraw_adapt",))
    assert result["update"] == best["updates"]
    assert (sum(result["acts"]) == 0) == (result["open_loop"]["base"] == result["open_loop"]["rectified"]) == (best["updates"] == 0 and method != "replace")
    film = imageio.mimread(folder / "prediction.gif")
    assert len(film) == 30 and film[0].shape[:2] == (3 * 98, 64 + 98)
    strip = imageio.v3.imread(folder / "prediction.png")
    assert strip.shape == (3 * 98, 64 + 6 * 98, 3)
    real = strip[:98, 64:].reshape(98, 6, 98, 3)[2:, :, 2:].swapaxes(0, 1)[:, ::6, ::6]  # one pixel of each enlarged one
    start = 30 * int(np.array_equal(real[0], rows["image"][30]))
    assert np.array_equal(real, rows["image"][start : start + 30 : 5])  # what really happened, every fifth step


def test_base_is_the_source_even_where_training_changed_it(monkeypatch, tmp_path):
    seen = []

    def look(draw, base, rectified, *rest):
        seen.extend([base, rectified])
        return diagnose(draw, base, rectified, *rest)

    monkeypatch.setattr(redraw_adapt, "diagnose", look)
    folder = adapt(tmp_path, random_rows(60), method="finetune", lr=1e-3)
    source, best = load_checkpoint(tmp_path / "draw.pt", ("draw_pretrain",)), load_checkpoint(folder / "best.pt", ("redraw_adapt",))
    assert best["updates"] > 0
    for dynamics, checkpoint in zip(seen, (source, best)):
        assert all(torch.equal(w, checkpoint["draw"][name]) for name, w in dynamics.draw[0].state_dict().items())
    result = json.loads((folder / "result.json").read_text())
    assert result["best"]["held-out"] < result["before"]["held-out"]


def test_report_leaves_no_trace_in_the_weights(monkeypatch, tmp_path):
    """The weights of a run are the same, bit for bit, where the report measures nothing."""
    folders = [adapt(tmp_path, random_rows(60), run="with")]
    figures, film = made_up(), torch.zeros(3, 1, 6, 16, 16, 3)
    monkeypatch.setattr(redraw_adapt, "diagnose", lambda *_: ({k: figures[k] for k in ("acts", "windows", "steps", "open_loop", "frames")}, film))
    folders.append(adapt(tmp_path, random_rows(60), run="without"))
    for name in ("best.pt", "last.pt"):
        a, b = (load_checkpoint(folder / name, ("redraw_adapt",)) for folder in folders)
        assert all(torch.equal(a[part][k], b[part][k]) for part in ("draw", "rectified") for k in a[part])


def test_report_repeats(tmp_path):
    texts = [(adapt(tmp_path, random_rows(60), run=run) / "report.txt").read_text() for run in ("a", "b")]
    assert texts[0] == texts[1]


def test_drift_is_seen_in_a_run(tmp_path):
    """Grey frames at home; black ones are drawn badly, grey ones are not."""
    torch.manual_seed(1)
    draw = DRAW(TINY).requires_grad_(False)  # the one that adapt() saves
    rows = random_rows(60) | {"image": np.random.default_rng(0).integers(120, 136, (60, 16, 16, 3), np.uint8)}
    home = source_range(draw, [{k: torch.from_numpy(v)[None] for k, v in rows.items()}])
    for run, image, words in (("grey", rows["image"], "HEALTHY"), ("black", rows["image"] // 40, "image error in 100% of the target's frames")):
        text = (adapt(tmp_path, rows | {"image": image}, home | {"kl": 1e3}, run=run) / "report.txt").read_text()
        assert words in " ".join(text.split()), text


def test_changed_looks_have_equal_dynamics():
    """The environments that the report's verdict on looks was tried with"""
    import changed_looks  # noqa: F401

    ends = {}
    for name in ("", "Camera", "Colours"):
        env = gym.make(f"redraw/PendulumSwingup{name}-v0", image_size=16)
        env.reset(seed=2)
        for action in (1.0, -0.5, 0.3):
            ends[name] = env.step(np.array([action], np.float32))[0]
        env.close()
    for name in ("Camera", "Colours"):
        assert np.array_equal(ends[name]["vector"], ends[""]["vector"])
        assert np.abs(ends[name]["image"].astype(int) - ends[""]["image"]).max() > 10
