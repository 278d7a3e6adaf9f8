"""The yardsticks: what random actions and the best known controller return in each environment.

The four pairs of DeepMind Control tasks are solved here from the true state, which the world model
never sees. Two tasks have an analytic controller: for the pendulum, pump energy until it suffices
to reach the top, then balance; for the reacher, compute the angles that reach the target, and go
there. The finger plans: it tries random changes of a plan in MuJoCo, in each step anew. The ball in
the cup has an actor trained by SAC (sbx-rl, stable-baselines3 in JAX), which goes on in the target,
with its wind, from the source's networks. Where the target reverses the actions, its expert is the
source's with the sign of the action changed, which is exact.

The finger has an actor in the source too, by SAC whose replay begins with the planner's steps. It
answers at once, and fails where the planner does not: so it is no yardstick, but it teaches
(docs/pretrained/dagger.py).

    python docs/figures/experts.py evaluate

runs 40 episodes each and writes experts.csv beside this file. `train` trains an actor anew; they
are kept in experts/ with the return during training. `record` writes data of an expert acting
in a target: images, velocities and actions, without rewards, as demonstrations for redraw_adapt.py.
Only `train` needs sbx-rl (requirements.txt beside this file).
"""

import csv
import sys
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import scipy.stats
import tyro
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import common  # noqa: E402, F401  it registers the environments

# isort: split
import mujoco  # noqa: E402  after common, which chooses how MuJoCo renders
from mujoco.rollout import rollout  # noqa: E402

PAIRS = {
    "pendulum": ("redraw/PendulumSwingup-v0", "redraw/PendulumSwingupReversed-v0"),
    "cup": ("redraw/BallInCupCatch-v0", "redraw/BallInCupCatchWindy-v0"),
    "finger": ("redraw/FingerTurnHard-v0", "redraw/FingerTurnHardTorque-v0"),
    "reacher": ("redraw/ReacherEasy-v0", "redraw/ReacherEasyReversed-v0"),
}
ENV_IDS = [env_id for pair in PAIRS.values() for env_id in pair]
COLUMNS = ("env_id", "controller", "episodes", "mean", "ci95", "worst", "seed", "training_steps")
CHECK_EVERY = 10_000  # steps of training between two looks at the return
INERTIA = 0.251  # of the pendulum, kg m^2
WEIGHT = 4.905  # mass * gravity * length of the pendulum, N·m
LINK = 0.12  # length of either link of the reacher, m
FULL = mujoco.mjtState.mjSTATE_FULLPHYSICS
CONTROLS = int(mujoco.mjtState.mjSTATE_CTRL | mujoco.mjtState.mjSTATE_XFRC_APPLIED)
HOLD = 32  # steps for which a random action of `record` is held


# ---- Environments ------------------------------------------------------------------------------


def true_state(env):
    """What the task itself calls its observation, as one float32 vector."""
    dmc = env.unwrapped.dmc
    parts = dmc.task.get_observation(dmc.physics).values()
    return np.concatenate([np.ravel(part) for part in parts]).astype(np.float32)


class TrueState(gym.Wrapper):
    """The environment with the true state as its observation; nothing is rendered."""

    def __init__(self, env_id, **options):
        super().__init__(gym.make(env_id, **options))
        # An image costs more time than the physics and an update of SAC together.
        self.unwrapped.render = lambda: None
        size = true_state(self).size
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)

    def reset(self, **kwargs):
        _, info = self.env.reset(**kwargs)
        return true_state(self), info

    def step(self, action):
        _, reward, terminated, truncated, info = self.env.step(action)
        return true_state(self), reward, terminated, truncated, info


# ---- Controllers: functions from the true state to an action in [-1, 1] ------------------------


def energy_shaping(state, gravity=1.0, mass=1.0):
    """The pendulum: state (cos, sin, speed) of the angle from the top -> torque (1,) in N·m.

    gravity, the torque of weight, and mass are relative to the task's own."""
    cos, sin, speed = state
    balance = -20.0 * np.arctan2(sin, cos) - 3.0 * speed
    if cos > 0.9 and abs(balance) < 5.0:
        return np.clip([balance], -1.0, 1.0)
    # The energy at rest at the top, and a little more for what friction takes on the way.
    wanted = gravity * WEIGHT + 0.3
    energy = 0.5 * mass * INERTIA * speed**2 + gravity * WEIGHT * cos
    direction = 1.0 if speed >= 0.0 else -1.0
    return np.clip([10.0 * direction * (wanted - energy)], -1.0, 1.0)


def inverse_kinematics(state):
    """The reacher: state (angles (2,), finger to target (2,), speeds (2,)) -> torques (2,).

    Two links of one length reach a point with the elbow on either side; the angles that ask for the
    shorter way are approached in proportion to what is missing.
    """
    shoulder, wrist = state[:2]
    directions = np.array([shoulder, shoulder + wrist])
    finger = LINK * np.array([np.cos(directions).sum(), np.sin(directions).sum()])
    target = finger + state[2:4]
    bend = np.arccos(np.clip(target @ target / (2.0 * LINK**2) - 1.0, -1.0, 1.0))
    ways = []
    for wanted_wrist in (bend, -bend):
        wanted_shoulder = np.arctan2(target[1], target[0]) - wanted_wrist / 2.0
        # The shoulder turns without end, the wrist does not.
        turn = (wanted_shoulder - shoulder + np.pi) % (2.0 * np.pi) - np.pi
        ways.append(np.array([turn, wanted_wrist - wrist]))
    shorter = min(ways, key=lambda way: np.abs(way).max())
    # The wrist is so light that it follows its torque within a step: damping would make it tremble.
    return np.clip([3.0, 2.0] * shorter - [0.3, 0.0] * state[4:6], -1.0, 1.0)


class Planner:
    """The finger: state of the task (12,) -> torques (2,), by predictive sampling.

    A plan holds KNOTS actions, LASTS steps each. In each step MuJoCo tries changes of the last plan
    and a few new ones, from the state and with the environment's own torque on the spinner. The one
    that is paid most is kept, and its first action done; the way to the target counts a little.
    """

    KNOTS, LASTS, PLANS, NEW = 6, 4, 48, 4
    RADIUS = 0.03  # of the target, m

    def __init__(self, env_id, seed=0):
        env = gym.make(env_id).unwrapped
        self.repeat = env.action_repeat * round(env.dmc.control_timestep() / env.physics.timestep())
        self.model = env.physics.model.ptr
        self.data = mujoco.MjData(self.model)
        self.wrenches = np.zeros((self.model.nbody, 6))
        if env.wrench is not None:
            body, wrench = env.wrench
            self.wrenches[self.model.body(body).id] = wrench
        self.rng = np.random.default_rng(seed)
        self.plan = np.zeros((self.KNOTS, 2))

    def __call__(self, state):
        deviation = np.linspace(0.0, 0.5, self.PLANS)[:, None, None]  # the first plan stays
        plans = self.plan + deviation * self.rng.normal(size=(self.PLANS, self.KNOTS, 2))
        plans[-self.NEW :] = self.rng.uniform(-1.0, 1.0, (self.NEW, self.KNOTS, 2))
        plans = plans.clip(-1.0, 1.0)
        gap = self.gaps(state, plans)  # (PLANS, steps of the physics)
        best = plans[((gap <= self.RADIUS) - 2.0 * gap).mean(1).argmax()]
        # One step later: each action moves a quarter of the way to the next one.
        knots = np.arange(self.KNOTS) * self.LASTS
        self.plan = np.stack([np.interp(knots + 1, knots, best[:, i]) for i in range(2)], 1)
        return best[0]

    def gaps(self, state, plans):
        """Distance of the spinner's tip from the target before each step of the physics, m, along
        plans (N, KNOTS, 2): (N, KNOTS * LASTS * repeat)"""
        target = state[9:11]  # x and z from the hinge, as the tip in state[2:4]
        self.data.qpos[:] = state[0], state[1], -np.arctan2(*state[2:4])
        self.data.qvel[:] = state[4:7]
        start = np.zeros(mujoco.mj_stateSize(self.model, FULL))
        mujoco.mj_getState(self.model, self.data, start, FULL)
        actions = plans.repeat(self.LASTS * self.repeat, 1)
        wrenches = np.broadcast_to(self.wrenches.ravel(), (*actions.shape[:2], self.wrenches.size))
        controls = np.concatenate([actions, wrenches], 2)
        starts = np.tile(start, (len(plans), 1))
        _, sensors = rollout(self.model, self.data, starts, controls, control_spec=CONTROLS)
        place = {name: self.model.sensor(name).adr[0] for name in ("tip", "spinner")}
        tip, hinge = (sensors[..., [adr, adr + 2]] for adr in place.values())
        return np.linalg.norm(tip - hinge - target, axis=-1)


def actor_file(env_id):
    return HERE / "experts" / f"{env_id.removeprefix('redraw/')}.npz"


def load_arrays(env_id):
    if not actor_file(env_id).exists():
        raise SystemExit(f"error: no expert of {env_id} is known; `train` makes one")
    with np.load(actor_file(env_id), allow_pickle=False) as file:
        return dict(file)


def actor(arrays):
    """What `train` saves: two hidden layers with ReLU, then tanh."""
    weights = [arrays[f"weight{i}"].astype(np.float32) for i in range(3)]
    biases = [arrays[f"bias{i}"].astype(np.float32) for i in range(3)]

    def act(state):
        hidden = np.maximum(state @ weights[0] + biases[0], 0.0)
        hidden = np.maximum(hidden @ weights[1] + biases[1], 0.0)
        return np.tanh(hidden @ weights[2] + biases[2])

    return act


def load_expert(env_id):
    """The best known controller of an environment: its name, itself, its steps of training."""
    if env_id.startswith("capacity:"):  # a changed pendulum brings its own
        return "energy shaping", gym.make(env_id).unwrapped.best_action, 0
    if "Reversed" in env_id:
        name, source, steps = load_expert(env_id.replace("Reversed", ""))
        return name, lambda state: -source(state), steps
    if "Pendulum" in env_id:
        return "energy shaping", energy_shaping, 0
    if "Reacher" in env_id:
        return "inverse kinematics", inverse_kinematics, 0
    if "Finger" in env_id:
        return "planning in MuJoCo", Planner(env_id), 0
    arrays = load_arrays(env_id)
    return "SAC on the true state", actor(arrays), int(arrays["steps"])


def load_teacher(env_id):
    """SAC's actor, if there is one, because it answers at once; else the best known controller. A
    planner keeps its last plan, so each environment needs one of its own."""
    if actor_file(env_id).exists():
        return actor(load_arrays(env_id))
    return load_expert(env_id)[1]


def random_actions(env_id, seed):
    """Uniform actions, a new one every step."""
    rng = np.random.default_rng(seed)
    spec = gym.make(env_id).action_space
    return lambda state: rng.uniform(-1.0, 1.0, spec.shape)


def returns_of(controller, env_id, episodes, seed):
    """Returns of whole episodes; episode i starts from the seed `seed` + i."""
    env = TrueState(env_id)
    returns = np.zeros(episodes)
    for i in range(episodes):
        state, _ = env.reset(seed=seed + i)
        done = False
        while not done:
            state, reward, terminated, truncated, _ = env.step(controller(state))
            returns[i] += reward
            done = terminated or truncated
    env.close()
    return returns


# ---- Commands ----------------------------------------------------------------------------------


def actor_arrays(model):
    """The mean of SAC's Gaussian actor; half precision is enough for it."""
    layers = model.policy.actor_state.params["params"]
    arrays = {}
    for i in range(3):
        arrays[f"weight{i}"] = np.asarray(layers[f"Dense_{i}"]["kernel"], np.float16)
        arrays[f"bias{i}"] = np.asarray(layers[f"Dense_{i}"]["bias"], np.float16)
    return arrays


def train_one(model, env_id, steps, seed):
    """Trains for `steps` steps, keeps the actor that returned most in 10 episodes."""
    path = actor_file(env_id)
    path.parent.mkdir(exist_ok=True)
    curve = [("steps", "return")]
    best = -1.0
    for done in range(CHECK_EVERY, steps + 1, CHECK_EVERY):
        model.learn(CHECK_EVERY, reset_num_timesteps=done == CHECK_EVERY)
        arrays = actor_arrays(model)
        mean = returns_of(actor(arrays), env_id, episodes=10, seed=100_000).mean()
        print(f"{env_id} {done} steps: {mean:.1f}", flush=True)
        if mean >= best:
            best = mean
            np.savez_compressed(path, steps=done, seed=seed, **arrays)
        curve.append((done, round(mean, 1)))
        with path.with_suffix(".csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(curve)


def four_copies(env_id):
    from stable_baselines3.common.vec_env import DummyVecEnv

    return DummyVecEnv([lambda: TrueState(env_id)] * 4)


def replay_plans(model, envs, env_id, steps):
    """Begins SAC's replay with so many steps of the planner. Noise disturbs them; it grows from
    environment to environment."""
    planners = [Planner(env_id, i) for i in range(envs.num_envs)]
    deviation = np.linspace(0.0, 0.7, envs.num_envs)[:, None]
    noise = np.zeros((envs.num_envs, 2), np.float32)
    state = envs.reset()
    for _ in tqdm(range(steps // envs.num_envs), "planning", unit="step"):
        noise = common.held_noise(noise, 4.0, 1.5)
        plans = np.stack([plan(one) for plan, one in zip(planners, state, strict=True)])
        action = (plans + deviation * noise).clip(-1.0, 1.0).astype(np.float32)
        after, reward, done, infos = envs.step(action)
        reached = after.copy()
        for i in np.flatnonzero(done):
            reached[i] = infos[i]["terminal_observation"]
            planners[i].plan[:] = 0.0
        model.replay_buffer.add(state, reached, action, reward, done, infos)
        state = after
    # SAC begins its episodes anew, so returns of several steps end here.
    model.replay_buffer.timeouts[model.replay_buffer.pos - 1] = True


def train_finger(steps, plan_steps, seed):
    """Short episodes, and in three of eight environments half of them begin moving: more states."""
    import sbx
    from stable_baselines3.common.vec_env import DummyVecEnv

    source, _ = PAIRS["finger"]
    speeds = [6.0 if i % 3 == 0 else 0.0 for i in range(8)]
    options = [{"start_speed": speed, "max_episode_steps": 100} for speed in speeds]
    envs = DummyVecEnv([lambda given=given: TrueState(source, **given) for given in options])
    envs.seed(seed)
    model = sbx.SAC(
        "MlpPolicy",
        envs,
        learning_rate=4e-4,
        buffer_size=steps + plan_steps,
        learning_starts=0,
        gamma=0.98,
        n_steps=3,
        ent_coef="auto_0.1",
        # Half an update a step: two steps in eight environments, then eight updates.
        train_freq=2,
        gradient_steps=8,
        policy_kwargs={"net_arch": [256, 256], "layer_norm": True},
        seed=seed,
    )
    replay_plans(model, envs, source, plan_steps)
    train_one(model, source, steps, seed)


def train(
    pair: Literal["cup", "finger"] = "cup",
    steps: int | None = None,
    target_steps: int = 50_000,
    plan_steps: int = 14_000,
    seed: int = 0,
):
    """Trains the actors of the cup or of the finger with SAC and keeps the best in experts/.

    Args:
        pair: whose
        steps: steps of training in the source; without it 100,000, the finger's 200,000
        target_steps: further ones in the target; the cup's alone
        plan_steps: steps of the planner in the replay; the finger's alone
        seed: of everything random
    """
    import sbx

    if pair == "finger":
        train_finger(steps or 200_000, plan_steps, seed)
        return
    source, target = PAIRS["cup"]
    model = sbx.SAC(
        "MlpPolicy",
        four_copies(source),
        learning_rate=5e-4,
        learning_starts=5000,
        # Half an update a step: two steps in four environments, then four updates.
        train_freq=2,
        gradient_steps=4,
        policy_kwargs={"net_arch": [128, 128]},
        seed=seed,
    )
    train_one(model, source, steps or 100_000, seed)
    # What was replayed so far shows the source's dynamics.
    model.replay_buffer.reset()
    model.set_env(four_copies(target))
    train_one(model, target, target_steps, seed)


def evaluate(
    pairs: tuple[Literal["pendulum", "cup", "finger", "reacher"], ...] = tuple(PAIRS),
    episodes: int = 40,
    seed: int = 0,
):
    """Runs random actions and the experts in sources and targets, writes experts.csv.

    Args:
        pairs: which pairs; the lines of the others stay in experts.csv as they are
        episodes: of each
        seed: of the first episode; each further one has the next
    """
    path = HERE / "experts.csv"
    env_ids = [env_id for pair in pairs for env_id in PAIRS[pair]]
    table = []
    if path.exists():
        with path.open(newline="") as file:
            table = [line for line in csv.reader(file) if line[0] in ENV_IDS]
    table = [line for line in table if line[0] not in env_ids]
    for env_id in env_ids:
        controllers = [("random", random_actions(env_id, seed), 0), load_expert(env_id)]
        for name, controller, steps in controllers:
            returns = returns_of(controller, env_id, episodes, seed)
            quantile = scipy.stats.t.ppf(0.975, episodes - 1)
            half = quantile * returns.std(ddof=1) / np.sqrt(episodes)
            figures = [f"{value:.1f}" for value in (returns.mean(), half, returns.min())]
            table.append((env_id, name, episodes, *figures, seed, steps))
            print(*table[-1], sep=", ", flush=True)
    table.sort(key=lambda line: ENV_IDS.index(line[0]))
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *table])


def record(
    env_id: str,
    out: Path,
    rows: int = 40_000,
    noise: float = 0.0,
    jitter: float = 0.0,
    episode_steps: int = 500,
    image_size: Literal[32, 64] = 64,
    seed: int = 1000,
):
    """Records an expert: row t holds x_t and the action taken at x_t; there is no reward.

    Args:
        env_id: environment, e.g. redraw/BallInCupCatchWindy-v0
        out: the .npz file to write
        rows: how many; the last episode may be cut short
        noise: share of steps with a random action, which is held for 32 steps
        jitter: the expert's other actions get noise that lasts 4 steps; its deviation is drawn for
            each episode, from 0 to this, so that some attempts fail narrowly
        episode_steps: of each episode; shorter: more of them, so more start states
        image_size: pixels
        seed: of the first episode; each further one has the next
    """
    if not 0.0 <= jitter <= 10.0 or not 1 <= episode_steps <= 500:
        sys.exit("error: --jitter must be from 0 to 10, --episode-steps from 1 to 500")
    env = gym.make(env_id, image_size=image_size, max_episode_steps=episode_steps)
    _, expert, _ = load_expert(env_id)
    rng = np.random.default_rng(seed)
    data = {name: [] for name in ("image", "vector", "action", "is_first", "is_last")}
    bar = tqdm(total=rows, unit="row", mininterval=1.0)
    while len(data["action"]) < rows:
        observation, _ = env.reset(seed=seed)
        seed += 1
        age = 0
        last = False
        # Without jitter no number is drawn for it, so that older records repeat.
        deviation = jitter * rng.random() if jitter else 0.0
        while True:
            if age % HOLD == 0:
                is_random = rng.random() < noise
                # Mostly at full force: it throws the expert into states that it never seeks.
                held = rng.uniform(-4.0, 4.0, env.action_space.shape).clip(-1.0, 1.0)
            if deviation and age % 4 == 0:
                shake = deviation * rng.standard_normal(env.action_space.shape)
            action = held if is_random else expert(true_state(env))
            if deviation and not is_random:
                action = (action + shake).clip(-1.0, 1.0)
            data["image"].append(observation["image"])
            data["vector"].append(observation["vector"])
            data["action"].append(action.astype(np.float32))
            data["is_first"].append(age == 0)
            data["is_last"].append(last)
            bar.update()
            if last or len(data["action"]) == rows:
                break
            observation, _, _, last, _ = env.step(action)
            age += 1
    bar.close()
    arrays = {name: np.stack(values[:rows]) for name, values in data.items()}
    # These tasks have a time limit and no other end.
    arrays["is_terminal"] = np.zeros(rows, bool)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.part")
    with unfinished.open("wb") as file:
        np.savez_compressed(file, **arrays)
    unfinished.replace(out)
    print(f"{out}: {rows} rows, {arrays['is_first'].sum()} episodes")


if __name__ == "__main__":
    commands = {"train": train, "evaluate": evaluate, "record": record}
    tyro.extras.subcommand_cli_from_dict(commands)
