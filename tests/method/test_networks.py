"""Shapes and properties of the networks, the recurrence of the belief, sampling, checkpoints."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import (
    TINY,
    Booby,
    image_shape,
    random_rows,
    random_states,
    save_tiny_adapted,
    save_tiny_draw,
    user_error,
)
from torch import nn

from common import (
    BINS,
    DRAW,
    Actor,
    Critic,
    Decoder,
    Encoder,
    Policy,
    Rectified,
    Sizes,
    init_weights,
    load_checkpoint,
    load_draw,
    load_policy,
    load_rectified,
    sample_onehot,
    save_checkpoint,
    unimix,
)
from draw_pretrain import Ensemble

METHODS = ("residual", "replace", "finetune", "lowrank", "none")


def images(*batch, sizes=TINY):
    return torch.randint(0, 256, image_shape(*batch, sizes=sizes), dtype=torch.uint8)


@pytest.mark.parametrize(
    "image_size, channels, V", [(16, 3, 5), (32, 1, 1), (64, 9, 2), (16, 4, 0), (32, 1, 0)]
)
def test_shapes(image_size, channels, V):
    sizes = {"image_size": image_size, "channels": channels, "vector_size": V, "action_size": 2}
    sizes = dataclasses.replace(TINY, **sizes)
    S, K, B, T = sizes.S, sizes.K, 2, 3
    draw = DRAW(sizes)
    image, vector = images(B, T, sizes=sizes), torch.randn(B, T, V)
    first = torch.zeros(B, T, dtype=torch.bool)
    embed = draw.encoder(image, vector)
    assert embed.shape == (B, T, draw.encoder.embed_size)
    # The image is halved down to 4x4, and the channels doubled each time but the first.
    pictures = 16 * sizes.cnn_depth * image_size // 8
    assert draw.encoder.embed_size == pictures + (sizes.vector_units if V else 0)
    q = draw.posterior(embed)
    z = sample_onehot(q.exp())
    flat = z.flatten(-2)
    _, _, action = random_states(B, T, sizes=sizes)
    u = draw.observe(z, action, first)
    assert q.shape == z.shape == u.shape == (B, T, S, K)
    assert draw.dynamics(z, u.softmax(-1), action).shape == (B, T, S, K)
    assert draw.decoder(flat).shape == image.shape
    assert draw.vector_head is None if not V else draw.vector_head(flat).shape == vector.shape
    assert draw.reward_head(flat).shape == (B, T, BINS)
    assert draw.reward(z).shape == draw.cont(z).shape == (B, T)
    assert all(x.shape == (S, K) for x in draw.initial())
    assert Critic(sizes)(z).shape == (B, T, BINS)
    assert Actor(sizes)(z).sample().shape == action.shape
    ensemble = Ensemble(sizes, draw.encoder.embed_size, members=4, target=7)
    assert ensemble(u, z, action).shape == (4, B, T, 7)
    assert ensemble.disagreement(u, z, action).shape == (B, T)
    assert Ensemble(sizes, 30, members=2, target=0)(u, z, action).shape == (2, B, T, 30)
    actions = Policy(sizes, draw, Actor(sizes))(image[:, 0].numpy(), vector[:, 0].numpy())
    assert actions.shape == (B, 2) and actions.dtype == np.float32 and np.abs(actions).max() <= 1
    zs = draw.open_loop(Rectified(draw), z[:, 0], action)
    assert zs.shape == (B, T + 1, S, K)


@pytest.mark.parametrize("channels", [1, 9])
def test_every_channel_is_seen_and_drawn(channels):
    sizes = dataclasses.replace(TINY, channels=channels)
    encoder, decoder = Encoder(sizes), Decoder(sizes)
    image, vector = images(4, sizes=sizes), torch.zeros(4, 2)
    embed = encoder(image, vector)
    for c in range(channels):
        other = image.clone()
        other[..., c] = 255 - other[..., c]
        assert not torch.allclose(encoder(other, vector), embed, atol=1e-3)
    drawn = decoder(random_states(50)[0].flatten(-2))
    assert (drawn.std(0) > 1e-3).all((0, 1)).tolist() == [True] * channels


@pytest.mark.parametrize(
    "size, value",
    [("image_size", 24), ("image_size", 8), ("S", 0), ("channels", 0), ("vector_size", -1)]
    + [("K", 2.0), ("units", 65537), ("units", True), ("S", "3")],
)
def test_sizes_that_can_not_be(size, value):
    with pytest.raises(ValueError, match=size):
        Sizes(**{size: value})


OPTIONS = [{}, {"hidden": 8, "layers": 2}, {"inputs": "za+sigma"}, {"inputs": "za+base"}]
OPTIONS += [{"members": 3}]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", OPTIONS)
def test_rectified_shapes(method, options):
    rectified = Rectified(DRAW(TINY), method, **options)
    z, sigma, action = random_states(2, 3)
    u = rectified(z, sigma, action)
    shape = (2, 3, TINY.S, TINY.K)
    assert u.shape == rectified.log_prior(u).shape == shape
    trained = sum(p.numel() for p in rectified.parameters())
    # The world model's weights are none of its own.
    assert (trained > 0) == (method in ("residual", "replace", "lowrank"))
    if method not in ("residual", "replace"):
        return
    base = rectified.base(z, sigma, action)
    members = rectified.residuals(z, action, sigma, base)
    assert members.shape == (options.get("members", 1), *shape)
    assert torch.allclose(rectified.residual(z, action, sigma, base), members.mean(0))
    Z, A, hidden = TINY.S * TINY.K, TINY.action_size, options.get("hidden", 256)
    if options.get("layers", 1) == 1:  # linear, norm, linear with bias
        n_in = Z + A + (Z if "inputs" in options else 0)
        n = n_in * hidden + 2 * hidden + hidden * Z + Z
        assert trained == n * options.get("members", 1)


def test_low_rank_adds_a_product_to_each_weight_of_f():
    draw = DRAW(TINY)
    rectified = Rectified(draw, "lowrank", rank=2)
    states = random_states(5)
    assert torch.equal(rectified(*states), draw.dynamics(*states))  # at first it adds nothing
    layers = [layer for layer in draw.dynamics_net if isinstance(layer, nn.Linear)]
    sides = sum(layer.in_features + layer.out_features for layer in layers)
    assert sum(p.numel() for p in rectified.parameters()) == 2 * sides
    for B in (change[1] for change in rectified.change):
        nn.init.normal_(B.weight)
    u = rectified(*states)
    assert torch.equal(rectified.log_prior(u), unimix(u))  # f's distribution, as DRAW has it
    for layer, (A, B) in zip(layers, rectified.change, strict=True):
        product = B.weight @ A.weight
        assert torch.linalg.matrix_rank(product) == 2
        layer.weight.data += product
    assert not torch.allclose(rectified(*states), u, atol=1e-3)  # added twice now
    assert torch.allclose(draw.dynamics(*states), u, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_residual_starts_as_a_no_op_and_replace_does_not(options):
    draw, states = DRAW(TINY), random_states(5)
    u = draw.dynamics(*states)
    for method in ("residual", "none", "finetune"):
        assert torch.equal(Rectified(draw, method, **options)(*states), u)
    assert not torch.allclose(Rectified(draw, "replace", **options)(*states), u, atol=1e-3)


def test_residual_is_added_to_the_logits():
    draw = DRAW(TINY)
    rectified = Rectified(draw, "residual", members=2)
    for i, delta in enumerate(rectified.delta):
        # Members say 1 and 2 for the first logit, 0 for the others.
        nn.init.constant_(delta[-1].bias[:1], 1.0 + i)
    states = random_states(5)
    e = rectified(*states) - draw.dynamics(*states)
    assert torch.allclose(e.flatten(-2)[:, 0], torch.full((5,), 1.5), atol=1e-5)  # their mean
    assert torch.allclose(e.flatten(-2)[:, 1:], torch.zeros(5, TINY.S * TINY.K - 1), atol=1e-5)


@pytest.mark.parametrize("inputs, sees", [("za", 0), ("za+sigma", 1), ("za+base", 2)])
def test_residual_sees_what_it_should(inputs, sees):
    z, sigma, action = random_states(5)
    base = torch.randn_like(sigma)
    # "replace": its output does not start at zero.
    rectified = Rectified(DRAW(TINY), "replace", inputs=inputs)
    e = rectified.residual(z, action, sigma, base)
    assert not torch.equal(e, rectified.residual(z.roll(1, -1), action, sigma, base))
    assert not torch.equal(e, rectified.residual(z, -action, sigma, base))
    same = torch.equal(e, rectified.residual(z, action, sigma.roll(1, -1), base))
    assert same == (sees != 1)
    assert torch.equal(e, rectified.residual(z, action, sigma, base.roll(1, -1))) == (sees != 2)
    # Of the base its probabilities are seen: a constant more is no difference.
    assert torch.allclose(e, rectified.residual(z, action, sigma, base + 3.0), atol=1e-5)


@pytest.mark.parametrize("inputs", ["z", "a", "", "za + sigma"])
def test_inputs_of_no_residual(inputs):
    with pytest.raises(ValueError, match="no such residual"):
        Rectified(DRAW(TINY), "residual", inputs=inputs)


def test_actions_beyond_the_bounds_act_like_the_bounds():
    draw = DRAW(TINY)
    z, sigma, _ = random_states(5)
    for f in (draw.dynamics, Rectified(draw, "replace"), Ensemble(TINY, 9, 2, 0)):
        full = f(z, sigma, torch.ones(5, 1))
        assert torch.equal(full, f(z, sigma, torch.full((5, 1), 3.0)))
        assert not torch.allclose(full, f(z, sigma, torch.full((5, 1), 0.5)))


def test_encoder_and_decoder_treat_every_frame_by_itself():
    encoder, decoder = Encoder(TINY), Decoder(TINY)
    image, vector, z = images(2, 3), torch.randn(2, 3, 2), torch.randn(2, 3, 12)
    embed, decoded = encoder(image, vector), decoder(z)
    assert torch.allclose(embed[1, 2], encoder(image[1, 2][None], vector[1, 2][None])[0], atol=1e-5)
    assert torch.allclose(decoded[1, 2], decoder(z[1, 2][None])[0], atol=1e-5)
    assert not torch.allclose(embed, encoder(255 - image, vector)) and not torch.allclose(
        embed, encoder(image, -vector)
    )


def test_initial_weights():
    for layer, fan in (
        (nn.Linear(400, 200), 300),
        (nn.Conv2d(30, 60, 4), 45 * 16),
        (nn.ConvTranspose2d(60, 30, 4), 45 * 16),
    ):
        weight = init_weights(layer).weight
        assert weight.std().item() == pytest.approx(fan**-0.5, rel=0.02)
        assert weight.abs().max() <= 2 * fan**-0.5 / 0.8796  # cut at two deviations
    draw = DRAW(TINY)
    z, _, _ = random_states(5)
    assert (
        draw.reward(z).abs().max() < 1e-4 and not Critic(TINY)(z).any()
    )  # reward and value start at zero


def test_unimix_is_normalised_and_leaves_no_class_impossible():
    for scale in (1.0, 10.0, 1e4):
        p = unimix(torch.randn(50, 3, 4) * scale).exp()
        assert torch.allclose(p.sum(-1), torch.ones(50, 3), atol=1e-5)
        assert p.min() >= 0.01 / 4 * 0.999
    assert unimix(torch.tensor([[9.0, -9.0]])).exp()[0, 1].item() == pytest.approx(
        0.99 * 1.523e-8 + 0.01 / 2
    )


def test_samples_are_one_hot_and_as_frequent_as_their_probabilities():
    probs = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.1, 0.1, 0.1, 0.7], [0.25, 0.25, 0.25, 0.25]])
    z = sample_onehot(probs.expand(40_000, -1, -1))
    assert torch.allclose(z.sum(-1), torch.ones(40_000, 3), atol=1e-5) and torch.allclose(
        z.max(-1).values, torch.ones(40_000, 3), atol=1e-5
    )
    assert torch.allclose(z.mean(0), probs, atol=0.01)  # four standard errors
    pairs = torch.einsum("ni,nj->ij", z[:, 0], z[:, 2]) / 40_000
    assert torch.allclose(
        pairs, probs[0][:, None] * probs[2], atol=0.01
    )  # the variables are independent of each other


def test_observe_restarts_at_a_border():
    draw = DRAW(TINY)
    nn.init.normal_(draw.initial_logits)
    z, _, action = random_states(2, 7)
    first = torch.zeros(2, 7, dtype=torch.bool)
    first[0, 3] = True  # only the first of the two sequences has a border
    u = draw.observe(z, action, first)
    alone = (
        draw.observe(z[:, :3], action[:, :3], first[:, :3]),
        draw.observe(z[:, 3:], action[:, 3:], first[:, 3:]),
    )
    assert torch.allclose(u[0], torch.cat(alone, 1)[0], atol=1e-6)
    assert torch.allclose(u[1, :3], alone[0][1], atol=1e-6) and not torch.allclose(
        u[1, 3:], alone[1][1], atol=1e-3
    )
    # The first step comes from the initial state and a zero action.
    start = draw.dynamics(*draw.initial(), torch.zeros(1))
    assert torch.allclose(u[:, 0], start, atol=1e-6)


def test_observe_goes_forward_in_time():
    draw = DRAW(TINY)
    z, _, action = random_states(1, 5)
    z.requires_grad_(), action.requires_grad_()
    first = torch.zeros(1, 5, dtype=torch.bool)
    for t in range(5):
        grads = torch.autograd.grad(
            draw.observe(z, action, first)[:, t].square().sum(),
            (z, action),
            allow_unused=True,
            materialize_grads=True,
        )
        # u_t depends on z and a before t: directly on those of t-1, through the belief on all
        # others
        for grad in grads:
            assert (grad.flatten(2) != 0).any(-1)[0].tolist() == [True] * t + [False] * (5 - t)
    assert torch.autograd.grad(draw.observe(z, action, first).square().sum(), draw.initial_logits)[
        0
    ].any()  # it is learned


def test_observe_feeds_back_the_belief_of_the_given_dynamics():
    draw = DRAW(TINY)
    z, _, action = random_states(2, 4)
    calls = []

    def dynamics(z_prev, sigma, a_prev):
        calls.append((z_prev, sigma, a_prev))
        return torch.randn_like(sigma)

    u = draw.observe(z, action, torch.zeros(2, 4, dtype=torch.bool), dynamics)
    for t in (1, 2, 3):
        assert torch.equal(calls[t][0], z[:, t - 1]) and torch.equal(calls[t][2], action[:, t - 1])
        assert torch.allclose(calls[t][1], u[:, t - 1].softmax(-1), atol=1e-6)


def test_actor_stays_within_its_bounds():
    actor = Actor(TINY)
    for bias in (-50.0, 0.0, 50.0):
        nn.init.constant_(actor.net[-1].bias, bias)
        pi = actor(random_states(20)[0])
        assert pi.mean.abs().max() <= 1 and pi.stddev.min() >= 0.1 and pi.stddev.max() <= 1.0


def test_ensemble_disagrees_only_where_its_members_differ():
    ensemble, (z, sigma, action) = Ensemble(TINY, 9, 3, 0), random_states(5)
    assert ensemble.disagreement(sigma, z, action).min() > 1e-3
    for member in ensemble.members:
        member.load_state_dict(ensemble.members[0].state_dict())
    assert ensemble.disagreement(sigma, z, action).max() < 1e-6


def policy_and_observations():
    rows = random_rows(50)
    return Policy(TINY, DRAW(TINY), Actor(TINY)), (rows["image"], rows["vector"])


def test_policy_shares_the_weights_of_its_parts():
    draw, actor = DRAW(TINY), Actor(TINY)
    policy = Policy(TINY, draw, actor)
    shared = {
        id(p) for module in (draw.encoder, draw.posterior_net, actor) for p in module.parameters()
    }
    assert {id(p) for p in policy.parameters()} == shared
    nn.init.constant_(
        actor.net[-1].bias, 20.0
    )  # mean 1 with deviation 1: what is learned later acts at once
    assert policy(*policy_and_observations()[1]).mean() > 0.3


def test_a_policys_noise_where_no_reward_is_predicted(tmp_path):
    """act_noise: its deviation where nothing is paid, half of it at 0.25, nothing from 0.5 on."""
    draw, actor = DRAW(TINY), Actor(TINY)
    nn.init.zeros_(actor.net[-1].weight)
    nn.init.zeros_(actor.net[-1].bias)  # the mean is 0
    policy = Policy(TINY, draw, actor, by_mean=True, noise=0.2)
    rows = random_rows(1)
    image = torch.tensor(rows["image"]).repeat(2000, 1, 1, 1)
    vector = torch.tensor(rows["vector"]).repeat(2000, 1)
    path = tmp_path / "policy.pt"
    sizes = dataclasses.asdict(TINY)
    kept = {"stage": "train_policy", "sizes": sizes, "policy": policy.state_dict()}
    save_checkpoint(path, by_mean=True, noise=0.2, **kept)
    for acts in (policy, load_policy(path)):
        for reward, deviation in ((-0.3, 0.2), (0.0, 0.2), (0.25, 0.1), (0.5, 0.0), (0.9, 0.0)):
            acts.reward = lambda z, reward=reward: torch.full((len(z),), reward)
            actions = acts.act(image, vector)
            assert actions.std(0).sub(deviation).abs().max() < 0.02
            assert actions.mean(0).abs().max() < 0.02
        del acts.reward
        # The reward that counts is that of the posterior itself.
        draw.reward_head = acts.reward_head
        q = acts.posterior(acts.encoder(image[:1], vector[:1])).exp()
        assert torch.equal(acts.reward(q), draw.reward(q))
    bad = [(True, noise) for noise in (-0.1, 10.5, float("nan"), "much")]
    for by_mean, noise in (*bad, (7.0, 0.2), (float("nan"), 0.2)):
        save_checkpoint(path, by_mean=by_mean, noise=noise, **kept)
        with user_error("policy.pt", "damaged"):
            load_policy(path)


def test_policy_survives_its_checkpoint(tmp_path):
    policy, observations = policy_and_observations()
    save_checkpoint(
        tmp_path / "policy.pt",
        stage="train_policy",
        sizes=dataclasses.asdict(TINY),
        policy=policy.state_dict(),
    )
    loaded = load_policy(tmp_path / "policy.pt")
    torch.manual_seed(3)
    actions = policy(*observations)
    torch.manual_seed(3)
    assert np.array_equal(loaded(*observations), actions)
    assert actions.std() > 0.1  # sampled, not the mode
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_world_model_and_residual_survive_their_checkpoint(tmp_path, method):
    draw = DRAW(TINY)
    rectified = Rectified(draw, method, 8, 2, "za+sigma", members=2, rank=3)
    for p in rectified.parameters():
        nn.init.normal_(p)
    save_tiny_draw(tmp_path / "source.pt", draw)
    save_tiny_adapted(tmp_path / "adapted.pt", draw, rectified)
    states = random_states(5)
    for name, f in (("source.pt", draw.dynamics), ("adapted.pt", rectified)):
        checkpoint = load_checkpoint(tmp_path / name, ("draw_pretrain", "redraw_adapt"))
        loaded = load_rectified(checkpoint, load_draw(checkpoint, "cpu"), "cpu")
        assert torch.equal(loaded(*states), f(*states))
        assert not any(p.requires_grad for p in loaded.parameters())


def test_checkpoints_that_can_not_be_used(tmp_path):
    path = tmp_path / "draw.pt"
    save_tiny_draw(path)
    with user_error(
        "draw_pretrain.py", "train_policy.py"
    ):  # of another stage: what it is, and what is needed
        load_policy(path)
    with user_error("nowhere.pt", "draw_pretrain.py"):
        load_checkpoint(tmp_path / "nowhere.pt", ("draw_pretrain",))
    with user_error(str(tmp_path)):  # a folder
        load_checkpoint(tmp_path, ("draw_pretrain",))
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2], whole[:-10], b"text\n" * 100):
        path.write_bytes(damaged)
        with user_error("draw.pt", "not a checkpoint"):
            load_checkpoint(path, ("draw_pretrain",))
    for foreign in ([1, 2], {"weights": torch.zeros(2)}):
        torch.save(foreign, path)
        with user_error("draw.pt"):
            load_checkpoint(path, ("draw_pretrain",))


def test_checkpoint_can_not_run_code(tmp_path):
    torch.save({"stage": "draw_pretrain", "x": Booby(tmp_path / "ran")}, tmp_path / "draw.pt")
    with user_error("draw.pt"):
        load_checkpoint(tmp_path / "draw.pt", ("draw_pretrain",))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("method", ["residual", "replace"])
def test_a_policy_gets_the_gradient_through_the_residual(method):
    draw = DRAW(TINY).requires_grad_(False)
    rectified = Rectified(draw, method).requires_grad_(False)
    for p in rectified.parameters():
        nn.init.normal_(p, std=0.3)  # a residual starts at zero
    z, sigma, action = random_states(5)
    z.requires_grad_(True)
    action.requires_grad_(True)

    def delta(z, action):
        e = rectified.delta[0](torch.cat([z.flatten(-2), action], -1))
        return e.unflatten(-1, z.shape[-2:])

    def gradient(u):
        return torch.autograd.grad((u * torch.arange(1.0, TINY.K + 1)).sum(), (z, action))

    expected = gradient(delta(z, action))
    if method == "residual":
        through_f = gradient(draw.dynamics(z, sigma, action))
        expected = [a + b for a, b in zip(expected, through_f, strict=True)]
    for found, wanted in zip(gradient(rectified(z, sigma, action)), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-6) and wanted.any()


def test_the_initial_z_is_the_mode_without_gradient():
    draw = DRAW(TINY)
    nn.init.normal_(draw.initial_logits)
    z, sigma = draw.initial()
    assert torch.equal(z, nn.functional.one_hot(draw.initial_logits.argmax(-1), TINY.K).float())
    assert not z.requires_grad and sigma.requires_grad
    assert torch.allclose(sigma, draw.initial_logits.softmax(-1))
