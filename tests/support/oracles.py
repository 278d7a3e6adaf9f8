"""The equations once more, slowly: float64 NumPy, plain loops, one row of a batch at a time. Shared
by the tests that compare with them.

Nothing here is shared with the sources but the weights of their networks. Where a quantity can be
written in a second way it is: the lambda-return is a sum over n-step returns, a gradient is a
difference quotient.
"""

import math

import numpy as np

# ---- networks


def weights64(sequential):
    """The weights of a common.mlp, by name"""
    return {name: w.detach().double().numpy().copy() for name, w in sequential.state_dict().items()}


def mlp64(weights, x):
    """Linear layers; each but the last is followed by LayerNorm (eps 1e-3) and SiLU. x (n,) ->
    (m,)"""
    for i in sorted({int(name.split(".")[0]) for name in weights}):
        w, b = weights[f"{i}.weight"], weights.get(f"{i}.bias", 0.0)
        if w.ndim == 2:
            x = np.array([sum(row * x) for row in w]) + b
        else:
            x = (x - x.mean()) / math.sqrt(((x - x.mean()) ** 2).mean() + 1e-3) * w + b
            x = x / (1 + np.exp(-x))
    return x


def bounded64(action):
    return np.array([a / max(1.0, abs(a)) for a in action])


def dynamics64(weights, z, sigma, action):
    """f: z, sigma (S, K), action (A,) -> u (S, K)"""
    return mlp64(weights, np.concatenate([z.ravel(), sigma.ravel(), bounded64(action)])).reshape(
        z.shape
    )


def residual64(members, z, action, also=None):
    """delta: the mean over its members of (z, a, what it sees besides)"""
    x = np.concatenate([z.ravel(), bounded64(action), [] if also is None else also.ravel()])
    return sum(mlp64(m, x) for m in members).reshape(z.shape) / len(members)


def actor64(weights, z):
    """mean and deviation (A,)"""
    out = mlp64(weights, z.ravel())
    A = len(out) // 2
    return np.tanh(out[:A]), np.array([0.9 / (1 + math.exp(-(s + 2))) + 0.1 for s in out[A:]])


def normal_log_prob64(mean, std, x):
    return sum(
        math.log(math.exp(-((v - m) ** 2) / (2 * s * s)) / (s * math.sqrt(2 * math.pi)))
        for m, s, v in zip(mean, std, x, strict=True)
    )


def normal_entropy64(std):
    return sum(0.5 * math.log(2 * math.pi * math.e * s * s) for s in std)


def initial64(draw):
    """The state before a first step: z, the mode of sigma, and sigma; (S, K)"""
    sigma = softmax64(draw.initial_logits.detach().double().numpy())
    return np.array([[float(v == max(row)) for v in row] for row in sigma]), sigma


def base64(draw, rectified):
    """(z, sigma, a) -> f, zeros where the method leaves f out"""
    f = weights64(draw.dynamics_net)
    matrices = [name for name, w in f.items() if w.ndim == 2]  # in the order of the layers
    for name, change in zip(matrices, rectified.change if rectified else (), strict=False):
        A, B = weights64(change).values()
        f[name] += B @ A
    uses_f = rectified is None or rectified.options["method"] != "replace"
    return lambda z, sigma, a: dynamics64(f, z, sigma, a) if uses_f else np.zeros_like(z)


def seen64(rectified, sigma, base):
    """What the residual sees beside z and a, from sigma_{t-1} and f_t"""
    return {"za": None, "za+sigma": sigma, "za+base": softmax64(base)}[rectified.options["inputs"]]


def step64(draw, rectified=None):
    """(z, sigma, a) -> u, as the method of `rectified` has it"""
    f = base64(draw, rectified)
    if rectified is None or rectified.options["method"] in ("none", "finetune", "lowrank"):
        return f
    members = [weights64(delta) for delta in rectified.delta]

    def step(z, sigma, a):
        base = f(z, sigma, a)
        return base + residual64(members, z, a, seen64(rectified, sigma, base))

    return step


# ---- distributions


def softmax64(u):
    """Of each variable by itself, (S, K)"""
    return np.array(
        [
            [math.exp(v - max(row)) / sum(math.exp(w - max(row)) for w in row) for v in row]
            for row in u
        ]
    )


def mix64(p):
    return np.array([[0.99 * v + 0.01 / len(row) for v in row] for row in p])


def kl64(p, q):
    """KL(p || q) of probabilities (S, K)"""
    return sum(
        p[s, k] * math.log(p[s, k] / q[s, k]) for s in range(p.shape[0]) for k in range(p.shape[1])
    )


def sample64(p, noise):
    """Inverse CDF: p (S, K), uniform noise (S,) -> one-hot (S, K)"""
    z = np.zeros_like(p)
    for s in range(len(p)):
        k, total = 0, p[s, 0]
        while noise[s] > total and k < p.shape[1] - 1:
            k += 1
            total += p[s, k]
        z[s, k] = 1.0
    return z


def symlog64(x):
    return math.copysign(math.log(1 + abs(x)), x)


def symexp64(y):
    return math.copysign(math.exp(abs(y)) - 1, y)


BINS64 = [-20 + 40 * i / 254 for i in range(255)]


def twohot64(x):
    """(255,): the mass on the two bins around symlog(x), in proportion to their nearness"""
    y, mass = min(max(symlog64(x), -20.0), 20.0), np.zeros(255)
    for i in range(254):
        low, high = BINS64[i], BINS64[i + 1]
        if low <= y <= high:
            mass[:] = 0.0
            mass[i], mass[i + 1] = (high - y) / (high - low), (y - low) / (high - low)
    return mass


def twohot_log_prob64(logits, x):
    return sum(twohot64(x) * (logits - logits.max() - math.log(sum(np.exp(logits - logits.max())))))


def twohot_mean64(logits):
    p = np.exp(logits - logits.max())
    return symexp64(sum(p * BINS64) / sum(p))


# ---- recurrence and imagination


def belief64(step, z, action, first, z0, sigma0):
    """Prior logits (T, S, K) along one sequence. step: function (z, sigma, a) -> u; z (T, S, K),
    action (T, A), first (T,)"""
    us = []
    for t in range(len(z)):
        if t == 0 or first[t]:
            us.append(step(z0, sigma0, np.zeros_like(action[0])))
        else:
            us.append(step(z[t - 1], softmax64(us[t - 1]), action[t - 1]))
    return np.array(us)


def imagine64(world, actor, z, sigma, action_noise, class_noise, seen=None):
    """H single steps of each of B rows.

    Args:
        world: has dynamics(z, sigma, a), prior(sigma), sample(p, noise).
        z, sigma: (B, S, K); action_noise (H, B, A), class_noise (H, B, S).
        seen: latents (H+1, B, S, K) that the actor looks at instead of the imagined ones.
    Returns:
        zs, sigmas (H+1, B, S, K), actions (H, B, A)
    """
    zs, sigmas, actions = [z], [sigma], []
    for t in range(len(action_noise)):
        rows = []
        for b in range(len(z)):
            mean, std = actor64(actor, (zs if seen is None else seen)[t][b])
            a = mean + std * action_noise[t][b]
            s = softmax64(world.dynamics(zs[t][b], sigmas[t][b], a))
            rows.append((world.sample(world.prior(s), class_noise[t][b]), s, a))
        for out, column in zip((zs, sigmas, actions), zip(*rows, strict=True), strict=True):
            out.append(np.array(column))
    return np.array(zs), np.array(sigmas), np.array(actions)


def lambda_returns64(rewards, discounts, values, lam):
    """R_0 .. R_{H-1} of one trajectory, as the weighted sum of its n-step returns. rewards r_1 ..
    r_H, discounts gamma c_1 .. gamma c_H, values v_0 .. v_H"""
    H, returns = len(rewards), []
    for t in range(H):

        def n_step(n, t=t):
            total, discount = 0.0, 1.0
            for k in range(t, t + n):
                total, discount = total + discount * rewards[k], discount * discounts[k]
            return total + discount * values[t + n]

        returns.append(
            sum((1 - lam) * lam ** (n - 1) * n_step(n) for n in range(1, H - t))
            + lam ** (H - t - 1) * n_step(H - t)
        )
    return returns


def weights_of64(discounts, alive):
    """w_0 .. w_{H-1} of one trajectory"""
    return [alive * math.prod(discounts[:t]) for t in range(len(discounts))]


def percentile64(values, share):
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def actor_critic64(
    world, nets, z, sigma, alive, noise, gamma, lam, entropy, average, floor, through_dynamics
):
    """One update of an actor-critic as numbers, and its two losses as functions of the weights.

    Args:
        world: as for imagine64, with reward(sigma, z, a, z_next) and cont(z) too.
        nets: weights of "actor", "critic" and "slow".
        alive: (B,). noise: (action_noise, class_noise). average: of the range of returns, before
            this update.
        through_dynamics: the actor's loss is the return itself, a function of the actor's weights
            through all that is imagined, but
            for what the actor looks at.
    Returns:
        dict of numbers, actor_loss (function of the actor's weights), critic_loss (function of the
        critic's weights)
    """
    H, B = len(noise[0]), len(z)

    def trajectories(actor, seen=None):
        zs, sigmas, actions = imagine64(world, actor, z, sigma, *noise, seen=seen)
        rewards = np.array(
            [
                [
                    world.reward(sigmas[t][b], zs[t][b], actions[t][b], zs[t + 1][b])
                    for b in range(B)
                ]
                for t in range(H)
            ]
        )
        discounts = np.array(
            [[gamma * world.cont(zs[t + 1][b]) for b in range(B)] for t in range(H)]
        )
        values = np.array(
            [
                [twohot_mean64(mlp64(nets["critic"], zs[t][b].ravel())) for b in range(B)]
                for t in range(H + 1)
            ]
        )
        returns = np.array(
            [lambda_returns64(rewards[:, b], discounts[:, b], values[:, b], lam) for b in range(B)]
        ).T
        return zs, actions, rewards, discounts, values, returns

    zs, actions, rewards, discounts, values, returns = trajectories(nets["actor"])
    weights = np.array([weights_of64(discounts[:, b], alive[b]) for b in range(B)]).T
    average = 0.99 * average + 0.01 * (
        percentile64(returns.ravel(), 0.95) - percentile64(returns.ravel(), 0.05)
    )
    scale = max(floor, average)
    slow = [
        [twohot_mean64(mlp64(nets["slow"], zs[t][b].ravel())) for b in range(B)] for t in range(H)
    ]

    def actor_loss(actor):
        R = trajectories(actor, seen=zs)[-1] if through_dynamics else None
        total = 0.0
        for t in range(H):
            for b in range(B):
                mean, std = actor64(actor, zs[t][b])
                gain = (
                    R[t, b]
                    if through_dynamics
                    else normal_log_prob64(mean, std, actions[t][b])
                    * (returns[t, b] - values[t, b])
                )
                total -= weights[t, b] * (gain / scale + entropy * normal_entropy64(std))
        return total / (H * B)

    def critic_loss(critic):
        total = 0.0
        for t in range(H):
            for b in range(B):
                logits = mlp64(critic, zs[t][b].ravel())
                total -= weights[t, b] * (
                    twohot_log_prob64(logits, returns[t, b]) + twohot_log_prob64(logits, slow[t][b])
                )
        return total / (H * B)

    numbers = {
        "return": returns.mean(),
        "reward": rewards.mean(),
        "average": average,
        "scale": scale,
        "entropy": np.mean(
            [normal_entropy64(actor64(nets["actor"], row)[1]) for t in range(H) for row in zs[t]]
        ),
        "actor_loss": actor_loss(nets["actor"]),
        "critic_loss": critic_loss(nets["critic"]),
    }
    return numbers, actor_loss, critic_loss


def quotients64(loss, weights, n, step=1e-5, seed=0):
    """d loss / d weight at n random places: [(name, flat index, difference quotient)]"""
    rng, out = np.random.default_rng(seed), []
    for name in list(weights) + list(rng.choice(list(weights), max(0, n - len(weights)))):
        i = rng.integers(weights[name].size)
        pair = []
        for sign in (1, -1):
            moved = weights | {name: weights[name].copy()}
            moved[name].flat[i] += sign * step
            pair.append(loss(moved))
        out.append((name, i, (pair[0] - pair[1]) / (2 * step)))
    return out


def check_gradients(loss, weights, module):
    """Those that are left in the module's parameters against difference quotients of the slow
    loss"""
    grads = {name: p.grad for name, p in module.named_parameters()}
    scale = max(g.abs().max().item() for g in grads.values())
    assert scale > 1e-6
    for name, i, slope in quotients64(loss, weights, 16):
        error = abs(grads[name].flatten()[i].item() - slope)
        assert error <= max(5e-3 * abs(slope), 2e-3 * scale), name
