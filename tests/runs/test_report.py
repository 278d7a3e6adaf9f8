"""The report at the end of stage 2: its figures against plain loops, its verdicts at their
thresholds, its files."""

import json

import gymnasium as gym
import imageio.v3
import numpy as np
import pytest
import torch
from helpers import (
    TINY,
    FixedReplay,
    random_rows,
    random_states,
    read_metrics,
    save_tiny_draw,
    tensors,
)

import redraw_adapt
from common import DRAW, Rectified, kl_categorical, load_checkpoint, sample_onehot, save_dataset
from draw_pretrain import PRESETS, source_range, world_model_loss
from redraw_adapt import DRIFT, PLATEAU, encode, measure, verdicts

HOME = {
    "kl": 2.0,
    "image error": [0.1, 0.2, 0.4],
    "vector error": [0.0, 0.01, 0.1],
    "posterior entropy": [1.0, 2.0, 3.0],
}


def trained(draw, method="residual"):
    """A Rectified whose residual is not zero"""
    rectified = Rectified(draw, method, hidden=8)
    torch.nn.init.normal_(rectified.delta[0][-1].weight)
    return rectified.requires_grad_(False)


# ---- stage 1's part


def one_hot_of_the_mode(probs):
    return torch.nn.functional.one_hot(probs.argmax(-1), probs.shape[-1]).float()


def test_source_range_is_that_of_the_loss():
    """On one batch: the KL of the world model's own loss, and quantiles of one frame's figures"""
    draw = DRAW(TINY).requires_grad_(False)
    rows = random_rows(60) | {"reward": np.zeros(60, np.float32)}
    data = tensors(rows, 5, 12)
    args = PRESETS["laptop"][1]
    torch.manual_seed(3)
    home = source_range(draw, FixedReplay(data), args, "cpu")
    torch.manual_seed(3)  # the same sample of z
    _, metrics, (embed, z, _) = world_model_loss(draw, data, args, soft=0.0)
    assert home["kl"] == pytest.approx(metrics["world_model/kl"].item(), rel=1e-5)
    entropy, image, vector = [], [], []
    for b in range(5):
        for t in range(12):
            q = draw.posterior(embed[b, t]).exp().numpy()
            entropy.append(-(q * np.log(q)).sum())
            code = z[b, t].flatten()[None]
            image.append(
                ((draw.decoder(code)[0].numpy() - rows["image"][12 * b + t] / 255) ** 2).sum()
            )
            true = rows["vector"][12 * b + t]
            vector.append(
                (
                    (draw.vector_head(code)[0].numpy() - np.sign(true) * np.log1p(np.abs(true)))
                    ** 2
                ).sum()
            )
    for name, values in (
        ("image error", image),
        ("vector error", vector),
        ("posterior entropy", entropy),
    ):
        assert home[name] == pytest.approx(
            np.quantile(values, [0.01, 0.5, 0.99]).tolist(), rel=1e-4
        )


# ---- the figures


def numbered_episodes(*lengths):
    """A dataset whose images show twice the row's number"""
    n = sum(lengths)
    rows = random_rows(n)
    rows["image"] = np.broadcast_to(2 * np.arange(n)[:, None, None, None], rows["image"].shape)
    rows["image"] = rows["image"].astype(np.uint8)
    rows["is_first"][:] = False
    rows["is_first"][np.cumsum([0, *lengths[:-1]])] = True
    return rows


@pytest.mark.parametrize(
    "lengths, left_out, starts, H",
    [
        ((45, 3, 60, 12), None, [0, 48], 40),
        ((45, 3, 45, 27), 2, [0], 40),  # an episode is kept out
        ((7, 5, 7), None, [0, 12], 6),  # as far as the data goes
        ((9, 9, 9, 9, 9, 9), None, [0, 9, 18, 27], 8),  # the film shows four
    ],
)
def test_sequences_of_the_report_stay_inside_an_episode(lengths, left_out, starts, H):
    draw = DRAW(TINY).requires_grad_(False)
    rows = numbered_episodes(*lengths)
    episode = np.cumsum(rows["is_first"]) - 1
    part = np.flatnonzero(episode != left_out)
    models = dict.fromkeys(("base", "rectified"), (draw, Rectified(draw)))
    figures, film = measure(models, HOME, rows, encode(draw, rows, "cpu"), part)
    assert film.shape == (H + 1, 3 * 16 * 3, len(starts) * 16 * 3, 3)
    shown = (film[:, 0, :: 16 * 3, 0].astype(int) + 1) // 2  # the real frames' numbers
    assert shown[0].tolist() == starts
    assert (np.diff(shown, axis=0) == 1).all()


@pytest.mark.parametrize("method", ["residual", "none"])
def test_open_loop_is_a_plain_loop(method):
    draw = DRAW(TINY).requires_grad_(False)
    torch.nn.init.normal_(draw.initial_logits)
    rectified = trained(draw) if method == "residual" else Rectified(draw)
    z, _, _ = random_states(4)
    action = torch.rand(4, 6, 1) * 2 - 1
    torch.manual_seed(5)
    zs = draw.open_loop(rectified, z, action)
    torch.manual_seed(5)
    sigma = draw.observe(z[:, None], action[:, :1], torch.ones(4, 1, dtype=torch.bool), rectified)[
        :, 0
    ].softmax(-1)
    assert torch.equal(zs[:, 0], z)
    for t in range(6):
        sigma = rectified(z, sigma, action[:, t]).softmax(-1)
        z = sample_onehot(sigma if method == "residual" else 0.99 * sigma + 0.01 / TINY.K)
        assert torch.equal(zs[:, t + 1], z)


@pytest.fixture
def data(monkeypatch):
    """An untrained model, its residual, a dataset of two episodes of 30 rows, its encoding, and the
    rows of the second episode, held out; the latents are modes"""
    monkeypatch.setattr(redraw_adapt, "sample_onehot", one_hot_of_the_mode)
    draw = DRAW(TINY).requires_grad_(False)
    rows = random_rows(60)
    encoded = encode(draw, rows, "cpu")
    return draw, Rectified(draw), trained(draw), rows, encoded, np.arange(30, 60)


def figures_of(data, rectified=None, home=None):
    draw, base, other, rows, encoded, held_out = data
    models = {"base": (draw, base), "rectified": (draw, rectified or other)}
    return measure(models, home, rows, encoded, held_out)


def test_where_it_acts(data):
    draw, base, rectified, rows, encoded, held_out = data

    def acts_of(dynamics):
        return figures_of(data, dynamics)[0]["KL(base || rectified)"]

    acts = acts_of(rectified)
    # A plain loop over the same belief
    z = one_hot_of_the_mode(encoded["log_q"][held_out])
    action = encoded["action"][held_out]
    sigma = rectified(*draw.initial(), torch.zeros(1)).softmax(-1)
    total = 0.0
    for t in range(29):
        u, f = (dynamics(z[t], sigma, action[t]) for dynamics in (rectified, base))
        total = total + kl_categorical(f.log_softmax(-1), u.log_softmax(-1)).item() / 29
        sigma = u.softmax(-1)
    assert acts["all"] == pytest.approx(total, rel=1e-4)
    assert sum(acts[f"variable {i}"] for i in range(3)) == pytest.approx(total, rel=1e-4)
    assert all(abs(value) < 1e-6 for value in acts_of(base).values())
    # A residual on variable 1 alone, which comes first
    rectified.delta[0][-1].weight.view(TINY.S, TINY.K, -1)[[0, 2]] = 0.0
    acts = acts_of(rectified)
    assert next(iter(acts)) == "variable 1" and acts["variable 1"] > 0.01
    assert max(abs(acts["variable 0"]), abs(acts["variable 2"])) < 1e-6


def test_open_loop_error(monkeypatch, data):
    """If the rollouts were the latents of `fixed`, the errors would be those of their pictures, at
    the right steps."""
    draw, base, rectified, rows, _, _ = data
    fixed = {dynamics: random_states(1, 30)[0] for dynamics in (base, rectified)}
    monkeypatch.setattr(DRAW, "open_loop", lambda self, dynamics, z, action: fixed[dynamics])
    figures, film = figures_of(data)
    real = film[:, : 16 * 3 : 3, ::3].astype(int)
    assert np.abs(real - rows["image"][30:]).max() <= 1
    for i, (name, dynamics) in enumerate((("base", base), ("rectified", rectified)), 1):
        assert list(figures[f"image error, {name}"]) == ["step 1", "step 5", "step 15"]
        for step in (1, 5, 15):
            code = fixed[dynamics][0, step].flatten()[None]
            image, vector = draw.decoder(code)[0].numpy(), draw.vector_head(code)[0].numpy()
            of_image = ((image - rows["image"][30 + step] / 255) ** 2).sum()
            true = rows["vector"][30 + step]
            of_vector = ((vector - np.sign(true) * np.log1p(np.abs(true))) ** 2).sum()
            for kind, error in (("image", of_image), ("vector", of_vector)):
                found = figures[f"{kind} error, {name}"][f"step {step}"]
                assert found == pytest.approx(error, rel=1e-4)
            shown = film[step, 48 * i : 48 * i + 48 : 3, ::3] / 255
            assert np.abs(shown - image.clip(0, 1)).max() < 0.01


def test_same_dynamics_have_the_same_error(data):
    """Both get the same chances, so a difference in the report is never one of luck alone."""
    same, other = (figures_of(data, dynamics)[0] for dynamics in (Rectified(data[0]), data[2]))
    for kind in ("image error", "vector error"):
        base = same[f"{kind}, base"]
        assert same[f"{kind}, rectified"] == base == other[f"{kind}, base"]
        assert base != other[f"{kind}, rectified"]


def test_frames_beside_the_source(data):
    """An error smaller than at home is no harm; an unusually certain posterior is suspect."""
    log_q = data[4]["log_q"][30:]
    entropy = -(log_q.exp() * log_q).sum((-2, -1)).numpy()
    home = {
        "image error": [0.0, 1.0, 1e9],
        "vector error": [1e8, 1e8, 1e9],
        "posterior entropy": np.quantile(entropy, [0.2, 0.5, 0.8]).tolist(),
    }
    shares = figures_of(data, home=home)[0]["frames outside the source's range"]
    assert shares["image error"] == shares["vector error"] == 0
    assert shares["posterior entropy"] == pytest.approx(0.4, abs=0.04)
    home["image error"] = [0.0, 0.0, 0.0]
    assert figures_of(data, home=home)[0]["frames outside the source's range"]["image error"] == 1
    assert "frames outside the source's range" not in figures_of(data)[0]


# ---- the verdicts


def made_up(held_out=2.0, train=2.0, outside=0.01, which="image error"):
    """Figures of a healthy adaptation, and what is put wrong"""
    shares = dict.fromkeys(("image error", "vector error", "posterior entropy"), 0.01)
    return {
        "KL train": {"base": 9.0, "rectified": train, "source": HOME["kl"]},
        "KL held-out": {"base": 9.0, "rectified": held_out, "source": HOME["kl"]},
        "frames outside the source's range": shares | {which: outside},
    }


LIMIT = PLATEAU * HOME["kl"]
HIGH, LOW = LIMIT + 0.01, LIMIT - 0.01


@pytest.mark.parametrize(
    "figures, words",
    [
        (made_up(), ["HEALTHY"]),
        (made_up(held_out=LOW, train=LOW), ["HEALTHY"]),
        (made_up(held_out=HIGH, train=HIGH), ["CAPACITY PLATEAU", "--hidden", "--updates"]),
        (made_up(held_out=HIGH, train=1.0), ["CAPACITY PLATEAU", "overfitted", "more target data"]),
        (made_up(held_out=float("nan")), ["CAPACITY PLATEAU"]),
        (made_up(outside=DRIFT - 0.01), ["HEALTHY"]),
        (made_up(outside=DRIFT + 0.01), ["VISUAL DRIFT", "image error in", "camera"]),
        (
            made_up(outside=0.9, which="posterior entropy"),
            ["VISUAL DRIFT", "posterior entropy in 90%"],
        ),
        (
            made_up(outside=0.9, which="vector error"),
            ["VISUAL DRIFT", "vector error in 90%", "units"],
        ),
    ],
)
def test_verdicts(figures, words):
    (verdict,) = verdicts(figures, "residual")
    assert verdict.startswith(words[0]) and all(w in verdict for w in words)


def test_both_verdicts():
    drift, plateau = verdicts(made_up(held_out=9.0, train=9.0, outside=0.9), "replace")
    assert drift.startswith("VISUAL DRIFT") and plateau.startswith("CAPACITY PLATEAU")
    assert "--hidden" not in plateau and "drift" in plateau  # no wrong track


def test_verdict_without_held_out_rows():
    figures = made_up(train=9.0)
    del figures["KL held-out"]
    assert verdicts(figures, "residual")[0].startswith("CAPACITY PLATEAU")


@pytest.mark.parametrize("method", ["none", "finetune"])
def test_no_advice_on_a_residual_where_there_is_none(method):
    (verdict,) = verdicts(made_up(held_out=HIGH, train=1.0), method)
    assert "--method residual" in verdict and "--hidden" not in verdict


# ---- the files


def adapt(tmp_path, rows, source=HOME, run="run", **flags):
    """Stage 2 with an untrained model; returns its run folder"""
    torch.manual_seed(1)
    save_tiny_draw(tmp_path / "draw.pt", source_range=source)
    save_dataset(tmp_path / "data.npz", rows)
    options = {"hidden": 8, "updates": 30, "batch": 4, "length": 5}
    options |= {"log_every": 10, "holdout": 0.5, "finetune_lr": 1e-3} | flags
    redraw_adapt.main(
        redraw_adapt.Args(
            str(tmp_path / "draw.pt"),
            dataset=str(tmp_path / "data.npz"),
            run_dir=str(tmp_path / run),
            device="cpu",
            **options,
        )
    )
    return tmp_path / run


@pytest.mark.parametrize(
    "method, source",
    [("residual", HOME), ("residual", None)]
    + [("replace", HOME), ("finetune", HOME), ("lowrank", HOME), ("none", None)],
)
def test_files_of_a_run(tmp_path, capsys, method, source):
    rows = random_rows(60)
    folder = adapt(tmp_path, rows, source, method=method)
    result = json.loads((folder / "result.json").read_text())
    text = (folder / "report.txt").read_text()
    assert text in capsys.readouterr().out
    assert result["verdicts"][0] in text and ("NO VERDICT" in text) == (source is None)
    assert result["data"]["rows"] == 60
    best = load_checkpoint(folder / "best.pt", ("redraw_adapt",))
    assert result["data"]["best.pt of update"] == best["updates"]
    unchanged = best["updates"] == 0 and method != "replace"
    assert (abs(result["KL(base || rectified)"]["all"]) < 1e-6) == unchanged
    errors = (result[f"image error, {name}"] for name in ("base", "rectified"))
    assert (next(errors) == next(errors)) == unchanged
    film = imageio.v3.imread(folder / "prediction.gif", index=None)
    assert film.shape[:3] == (30, 3 * 48, 48)
    real = film[:, :48:3, ::3].astype(int)  # one pixel of each enlarged one
    start = 30 * int(np.abs(real[0] - rows["image"][30]).mean() < 20)
    assert np.abs(real - rows["image"][start : start + 30]).mean() < 20  # what really happened


def test_base_is_the_source_even_where_training_changed_it(monkeypatch, tmp_path):
    seen = []

    def look(models, *rest):
        seen.extend(dynamics for _, dynamics in models.values())
        return measure(models, *rest)

    monkeypatch.setattr(redraw_adapt, "measure", look)
    folder = adapt(tmp_path, random_rows(60), method="finetune")
    source = load_checkpoint(tmp_path / "draw.pt", ("draw_pretrain",))
    best = load_checkpoint(folder / "best.pt", ("redraw_adapt",))
    assert best["updates"] > 0
    for dynamics, checkpoint in zip(seen, (source, best), strict=True):
        weights = dynamics.f.__self__.state_dict()  # f is a method of the world model
        assert all(torch.equal(w, checkpoint["draw"][name]) for name, w in weights.items())
    result = json.loads((folder / "result.json").read_text())
    assert result["KL held-out"]["rectified"] < result["KL held-out"]["base"]


def test_evaluations_leave_no_trace_in_the_weights(tmp_path):
    """The weights of a run are the same, bit for bit, however often it is looked at."""
    folders = [
        adapt(tmp_path, random_rows(60), run=str(every), log_every=every) for every in (3, 30)
    ]
    a, b = (load_checkpoint(folder / "last.pt", ("redraw_adapt",)) for folder in folders)
    for part in ("draw", "rectified"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])


def test_without_holdout_best_is_the_last(tmp_path):
    """and all rows are trained on."""
    folder = adapt(tmp_path, random_rows(60), holdout=0.0)
    best, last = (
        load_checkpoint(folder / name, ("redraw_adapt",)) for name in ("best.pt", "last.pt")
    )
    assert best["updates"] == last["updates"] == 30
    weights = last["rectified"].items()
    assert all(torch.equal(w, best["rectified"][name]) for name, w in weights)
    assert set(read_metrics(folder)) >= {"adapt/kl_train", "adapt/loss"}
    assert "adapt/kl_held-out" not in read_metrics(folder)
    args = redraw_adapt.Args("", length=5, holdout=0.0)
    rows = redraw_adapt.split_episodes(random_rows(60)["is_first"], args)
    assert list(rows) == ["train"] and rows["train"].tolist() == list(range(60))


def test_of_a_single_endless_episode_the_last_part_is_held_out():
    is_first = np.arange(100) == 0
    rows = redraw_adapt.split_episodes(is_first, redraw_adapt.Args("", length=5, holdout=0.2))
    assert rows["train"].tolist() == list(range(80))
    assert rows["held-out"].tolist() == list(range(80, 100))


def test_report_repeats(tmp_path):
    texts = [
        (adapt(tmp_path, random_rows(60), run=run) / "report.txt").read_text() for run in ("a", "b")
    ]
    assert texts[0] == texts[1]


def test_drift_is_seen_in_a_run(tmp_path):
    """Grey frames at home; black ones are drawn badly, grey ones are not."""
    torch.manual_seed(1)
    draw = DRAW(TINY).requires_grad_(False)  # the one that adapt() saves
    rows = random_rows(60) | {
        "image": np.random.default_rng(0).integers(120, 136, (60, 16, 16, 3), np.uint8)
    }
    data = tensors(rows, 1, 60)
    home = source_range(draw, FixedReplay(data), PRESETS["laptop"][1], "cpu")
    for run, image, words in (
        ("grey", rows["image"], "HEALTHY"),
        ("black", rows["image"] // 40, "range are image error in 100%"),
    ):
        text = (
            adapt(tmp_path, rows | {"image": image}, home | {"kl": 1e3}, run=run) / "report.txt"
        ).read_text()
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
