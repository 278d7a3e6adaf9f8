"""Everything that can be wrong with flags, checkpoints, datasets and environments: one line, and no
file is touched.

Flags are tried twice, in a new run folder and, with --overwrite, in one that holds a run: neither
may change anything.
"""

import contextlib
import dataclasses
import io
import os
import pickle
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils.tensorboard  # noqa: F401 (before a test gives its rights away)
import tyro
from bad_env import Once
from bad_files import (
    ADAPTED,
    CHECKPOINTS,
    DATASETS,
    N,
    adapted_checkpoint,
    file_name,
    npz_bytes,
    policy_checkpoint,
    write_files,
)
from helpers import TINY, random_rows, save_tiny_draw, tiny_checkpoint
from stages import ADAPT, POLICY, PRETRAIN, metric, run

import draw_pretrain
import redraw_adapt
import train_policy
from common import (
    DRAW,
    load_checkpoint,
    load_dataset,
    load_draw,
    load_policy,
    load_rectified,
    save_checkpoint,
    save_dataset,
)

TARGET = "--target-env-id toy_env:ToyReversed-v0 --collect-policy random"
DRAW_AND_DATA = ["--checkpoint", "{F}/draw.pt", "--dataset", "{F}/data.npz"]
STAGES = {
    "pretrain": (draw_pretrain, [*PRETRAIN, "--env-id", "toy_env:Toy-v0"]),
    "adapt": (redraw_adapt, [*ADAPT, *DRAW_AND_DATA]),
    "collect": (redraw_adapt, [*ADAPT, "--checkpoint", "{F}/draw.pt"]),
    "policy": (train_policy, [*POLICY, *DRAW_AND_DATA]),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with one good file of each kind, two runs, and every bad file"""
    F = tmp_path_factory.mktemp("files")
    rows = random_rows(N)
    save_tiny_draw(F / "draw.pt")
    save_dataset(F / "data.npz", rows)
    save_checkpoint(F / "policy.pt", **policy_checkpoint())
    save_checkpoint(F / "adapted.pt", **adapted_checkpoint())
    save_checkpoint(
        F / "no-actors.pt", **tiny_checkpoint(task_actor=None, explore_actor=None, task_critic=None)
    )
    save_checkpoint(
        F / "wide-policy.pt", **policy_checkpoint(dataclasses.replace(TINY, vector_size=9))
    )
    save_checkpoint(F / "NaN-policy.pt", **policy_checkpoint(factor=torch.nan))
    write_files(F, "checkpoint", CHECKPOINTS | ADAPTED, F)
    write_files(F, "dataset", DATASETS, rows, F)
    for run_dir in (
        "old",
        "half",
    ):  # half: of a run that was killed, or whatever else is in a folder
        save_dataset(F / run_dir / "replay" / "env000-00000.npz", random_rows(6))
        for name in (
            "draw.pt",
            "best.pt",
            "dataset.npz",
            "metrics.csv",
            "result.json",
            "events.out.tfevents.1",
        ):
            (F / run_dir / name).write_text(f"what an hour of training made: {name}")
    (F / "old" / "args.json").write_text("{}")
    (F / "empty-folder").mkdir()
    for name, second in (
        ("bad-chunk", b"not a chunk"),
        ("other-chunk", npz_bytes(random_rows(6, dataclasses.replace(TINY, vector_size=5)))),
    ):
        save_dataset(F / name / "0.npz", random_rows(6))
        (F / name / "1.npz").write_bytes(second)
    (F / "folder-of-folders" / "0.npz").mkdir(parents=True)
    (F / "raises_at_import.py").write_text("raise RuntimeError('a module of mine\\nis not ready')")
    (F / "no_python.py").write_text("def broken(:")
    return F


# ---- flags: (stage, flags, words of the message); no words: tyro's own message, which is longer,
# and exit status 2


def flagged(stage, text, *words):
    return pytest.param(stage, text.split(), list(words), id=f"{stage} {text}"[:80])


def filed(table, kind, *stages):
    """The cases of a table of files, the stages in turn: all read with the same functions. The
    traps are set to each."""
    cases = [
        (stage, n, words)
        for i, (n, (_, words)) in enumerate(table.items())
        for stage in (stages if "trap" in n else [stages[i % len(stages)]])
    ]
    return [
        flagged(stage, f"--{kind} {{F}}/{file_name(kind, n)}", file_name(kind, n), *words)
        for stage, n, words in cases
    ]


def env(name, *words, stages=("pretrain", "collect", "policy")):
    flag = {
        "pretrain": "--env-id",
        "collect": "--collect-policy random --target-env-id",
        "policy": "--eval-env-ids",
    }
    return [flagged(stage, f"{flag[stage]} {name}", name, *words) for stage in stages]


FLAGS = [
    # of all stages
    *(
        flagged(stage, flags, *words)
        for stage in ("pretrain", "adapt", "policy")
        for flags, *words in (
            ("--seed -1", "--seed"),
            ("--seed 4294967295", "--seed"),
            ("--seed 99999999999999999999999999", "--seed"),
            ("--batch 0", "--batch"),
            ("--batch -4", "--batch"),
            ("--batch 9999999999", "--batch"),
            ("--length 0", "--length"),
            ("--log-every 0", "--log-every"),
            ("--device tpu", "--device tpu"),
            ("--device meta", "--device meta"),
            ("--device cuda:99", "--device cuda:99"),
            ("--run-dir {F}/draw.pt", "draw.pt"),
            ("--run-dir {F}/draw.pt/run", "draw.pt"),
            ("--run-dir {F}/old", "old", "--overwrite"),
            ("--run-dir {F}/half", "--overwrite"),
            ("--run-dir /proc/run", "/proc/run"),
            ("--run-dir {F}/" + "x" * 300, "xxx"),
            # tyro's own
            ("--no-such-flag 1",),
            ("--batch many",),
            ("--batch 1.5",),
            ("--batch",),
            ("--overwrite perhaps",),
        )
    ),
    # stage 1
    *(
        flagged("pretrain", flags, *words)
        for flags, *words in (
            ("--steps 0", "--steps"),
            ("--steps -5", "--steps"),
            ("--steps 400", "--prefill"),  # is as many
            ("--prefill 601", "--prefill"),
            ("--prefill -1", "--prefill"),
            ("--prefill 10", "--prefill"),
            ("--n-envs 0", "--n-envs"),
            ("--n-envs 100", "--prefill"),
            ("--replay-size 10", "--replay-size"),
            ("--replay-size 0", "--replay-size"),
            ("--replay-size 1000000000000000", "--replay-size"),
            ("--replay-size 1" + 30 * "0", "--replay-size"),
            ("--starts 33", "--starts"),  # of 4 sequences of 8
            ("--starts 0", "--starts"),
            ("--length 1", "--length"),
            ("--horizon 0", "--horizon"),
            ("--horizon -1", "--horizon"),
            ("--S 0", "--S"),
            ("--S 1" + 30 * "0", "--S"),
            ("--K 1", "--K"),
            ("--K 0", "--K"),
            ("--units 0", "--units"),
            ("--units 65536 --S 65536 --K 65536", "memory"),
            ("--cnn-depth -1", "--cnn-depth"),
            ("--vector-layers 0", "--vector-layers"),
            ("--ensemble 1", "--ensemble"),
            ("--ensemble-target -1", "--ensemble-target"),
            ("--episode-steps 0", "--episode-steps"),
            ("--hold 0", "--hold"),
            ("--hold inf", "--hold"),
            ("--gain 0", "--gain"),
            ("--save-every 0", "--save-every"),
            ("--train-every 0", "--train-every"),
            ("--train-every inf", "--train-every"),
            ("--warmup -1", "--warmup"),
            ("--soft-updates -1", "--soft-updates"),
            ("--image-scale nan", "--image-scale"),
            ("--vector-scale -1", "--vector-scale"),
            ("--rewarded nan", "--rewarded"),
            ("--rewarded 1.5", "--rewarded"),
            ("--gamma 1.5", "--gamma"),
            ("--gamma nan", "--gamma"),
            ("--lam -1", "--lam"),
            ("--entropy nan", "--entropy"),
            ("--entropy -1", "--entropy"),
            ("--return-floor 0", "--return-floor"),
            ("--lr nan", "--lr"),
            ("--lr -1", "--lr"),
            ("--actor-lr nan", "--actor-lr"),
            ("--critic-lr inf", "--critic-lr"),
            ("--candidates 4", "--candidates"),
            ("--ahead 0", "--ahead"),
            ("--states 0", "--states"),
            ("--lesson-steps 0", "--lesson-steps"),
            ("--policy-start -1", "--policy-start"),
            ("--policy-every 0", "--policy-every"),
            ("--image-size 0 --env-id redraw/PendulumSwingup-v0", "--image-size"),
            ("--image-size -64 --env-id redraw/PendulumSwingup-v0", "--image-size"),
            ("--image-size 48 --env-id redraw/PendulumSwingup-v0", "48"),
            ("--image-size 8 --env-id redraw/PendulumSwingup-v0", "8"),
            ("--image-size 1024 --env-id redraw/PendulumSwingup-v0", "1024"),
            ("--collect sometimes",),
            ("--learn none",),
        )
    ),
    # stage 2
    *(
        flagged("adapt", flags, *words)
        for flags, *words in (
            ("--updates -1", "--updates"),
            ("--length 1", "--length"),
            ("--length 40", "--length"),  # longer than the held-out episode
            ("--holdout 2", "--holdout"),
            ("--holdout -0.1", "--holdout"),
            ("--holdout nan", "--holdout"),
            ("--holdout 1", "--holdout"),
            ("--dataset-rows 1", "--dataset-rows"),
            ("--dataset-rows 8", "too few"),
            ("--finetune-lr 0", "--finetune-lr"),
            ("--finetune-lr nan", "--finetune-lr"),
            ("--inputs z",),
            ("--hidden 0", "--hidden"),
            ("--soft 1.1", "--soft"),
            ("--l2 -1", "--l2"),
            ("--ema-decay 1", "--ema-decay"),
            ("--ema-decay nan", "--ema-decay"),
            ("--hidden 1000000000000", "--hidden"),
            ("--layers 0", "--layers"),
            ("--rank 0", "--rank"),
            ("--rank 1000000000000", "--rank"),
            ("--members 0", "--members"),
            ("--members 1000000000000", "--members"),
            ("--lr 0", "--lr"),
            ("--lr nan", "--lr"),
            ("--lr -1", "--lr"),
            ("--lr inf", "--lr"),
            ("--dataset {F}/nowhere.npz", "nowhere.npz"),
            ("--checkpoint {F}/adapted.pt", "redraw_adapt.py", "draw_pretrain.py"),
            ("--method magic",),
        )
    ),
    *(
        flagged("collect", flags, *words)
        for flags, *words in (
            ("", "--dataset", "--target-env-id"),  # neither
            (TARGET + " --collect-steps 31", "--collect-steps"),
            (TARGET + " --collect-steps -1", "--collect-steps"),
            (TARGET + " --collect-noise 2", "--collect-noise"),
            (TARGET + " --collect-noise nan", "--collect-noise"),
            (TARGET + " --n-envs 0", "--n-envs"),
            (TARGET + " --hold -1", "--hold"),
            (TARGET + " --gain 0", "--gain"),
            (TARGET + " --look strange",),
            (TARGET + " --episode-steps -1", "--episode-steps"),
            (TARGET + " --collect-policy nonexisting", "nonexisting"),
            (TARGET + " --collect-policy {F}", "not a checkpoint"),
            (TARGET + " --collect-policy {F}/draw.pt", "train_policy.py"),
            (TARGET + " --collect-policy {F}/data.npz", "data.npz"),
            (TARGET + " --collect-policy {F}/wide-policy.pt", "vector_size"),
            (TARGET + " --collect-policy {F}/NaN-policy.pt", "finite"),
            (TARGET + " --collect-policy zero-shot --checkpoint {F}/no-actors.pt", "task_actor"),
            (TARGET + " --collect-policy explore --checkpoint {F}/no-actors.pt", "explore_actor"),
        )
    ),
    # stage 3
    *(
        flagged("policy", flags, *words)
        for flags, *words in (
            ("--updates -1", "--updates"),
            ("--updates 0", "--warm-start both"),
            ("--n-envs 0", "--n-envs"),
            ("--dataset-rows 1", "--dataset-rows"),
            ("--starts 9", "--starts"),  # of 2 sequences of 4
            ("--least-reward -1", "--least-reward"),
            ("--restart 1.1", "--restart"),
            ("--candidates 4", "--candidates"),
            ("--ahead 0", "--ahead"),
            ("--states 0", "--states"),
            ("--lesson-steps 0", "--lesson-steps"),
            ("--actor-lr nan", "--actor-lr"),
            ("--critic-lr -1", "--critic-lr"),
            ("--warm-start actor",),
            ("--checkpoint {F}/no-actors.pt --warm-start both", "--warm-start"),
            ("--eval-env-ids bad_env:Once-v0", "--n-envs 1"),
            ("--length 61", "--length"),  # of 60 rows
            ("--length 1000000", "--length"),
            ("--horizon 0", "--horizon"),
            ("--rewarded -0.1", "--rewarded"),
            ("--rewarded nan", "--rewarded"),
            ("--gamma 1.5", "--gamma"),
            ("--lam -1", "--lam"),
            ("--lam nan", "--lam"),
            ("--entropy nan", "--entropy"),
            ("--return-floor 0", "--return-floor"),
            ("--return-floor nan", "--return-floor"),
            ("--eval-every -1", "--eval-every"),
            ("--eval-episodes 1", "--eval-episodes"),
            ("--checkpoint {F}/policy.pt", "train_policy.py", "redraw_adapt.py"),
            ("--eval-env-ids toy_env:Toy-v0 toy_env:NoSuch-v0", "NoSuch"),
            ("--eval-env-ids bad_env:Endless-v0", "time limit"),
            ("--learn none",),
        )
    ),
    # paths
    *(
        flagged(stage, flags, *words)
        for stage in ("adapt", "policy")
        for flags, *words in (
            ("--checkpoint {F}", "not a checkpoint"),
            ("--checkpoint {F}/nowhere.pt", "nowhere.pt"),
            ("--checkpoint {F}/" + "x" * 300, "not a checkpoint"),
            (
                "--checkpoint /proc/self/mem",
                "/proc/self/mem",
            ),  # not even root can read its beginning
            ("--dataset {F}/empty-folder", "no dataset"),
            ("--dataset {F}/folder-of-folders", "no dataset"),
            ("--dataset {F}/bad-chunk", "1.npz"),
            ("--dataset {F}/other-chunk", "vector"),
            ("--dataset {F}/" + "x" * 300, "no dataset"),
            ("--dataset /proc/self/mem", "/proc/self/mem"),
            ("--dataset /dev/null", "no dataset"),
        )
    ),
]

ENVIRONMENTS = [
    *env("redraw/NoSuch-v0", "redraw/PendulumSwingup-v0"),  # names what there is
    *env("no_such_module:Toy-v0"),
    *env("toy_env:NoSuch-v0"),
    *env("raises_at_import:Toy-v0", "not ready"),
    *env("no_python:Toy-v0", "SyntaxError"),
    *env("toy_env:Toy-v0:Toy-v0"),
    *env("toy_env:", stages=["pretrain"]),
    *env("..:Toy-v0", stages=["pretrain"]),
    *env("CartPole-v1", "image", stages=["pretrain"]),
    *env("toy_env:ToyDiscrete-v0", "action"),
    *env("toy_env:ToyWideActions-v0", "RescaleAction"),
    *env("toy_env:ToyImages-v0", "vector_size", stages=["collect", "policy"]),
    *env("toy_env:ToyGrey-v0", "channels", stages=["collect", "policy"]),
    *env("toy_env:ToyFloatImage-v0", "uint8"),
    *env("toy_env:ToyOddImage-v0", "64"),
    *env("toy_env:ToyDoubleVector-v0", "float32"),
    *(
        case
        for name, *words in (
            ("NoDict", "Dict"),
            ("Tuple", "Dict"),
            ("Nested", "image"),
            ("More", "depth"),
            ("NoImage", "image"),
            ("DiscreteVector", "vector"),
            ("TinyImage", "image"),
            ("WideImage", "image"),
            ("FlatImage", "image"),
            ("NoAction", "action"),
            ("WholeActions", "action"),
            ("TableOfActions", "action"),
            ("MultiDiscrete", "action"),
            ("FloatImage", "float32"),
            ("FourValues", "step 5"),
            ("RewardArray", "reward"),
            ("Once", "--n-envs 1"),
            ("Unmade", "OSError", "licence server"),
            ("Quits", "KeyError"),
        )
        for case in env(f"bad_env:{name}-v0", *words, stages=["pretrain"])
    ),
    *(
        case
        for name in ("NoDict", "FourValues", "NoAction", "Unmade")
        for case in env(f"bad_env:{name}-v0", stages=["collect", "policy"])
    ),
    *env(
        "bad_env:TwoActions-v0", "action_size", stages=["collect", "policy"]
    ),  # the checkpoint has one
    *env("redraw/PendulumSwingup-v0", "vector_size", stages=["collect", "policy"]),
]

CASES = [
    *FLAGS,
    *ENVIRONMENTS,
    *filed(CHECKPOINTS, "checkpoint", "adapt", "policy"),
    *filed(ADAPTED, "checkpoint", "policy"),
    *filed(DATASETS, "dataset", "adapt", "policy"),
]


def contents(folder):
    """Everything under a folder: {path: bytes, or None for a folder}"""
    return {
        p: p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
        if "__pycache__" not in p.parts
    }


def attempt(monkeypatch, F, stage, flags):
    """What `python SCRIPT.py FLAGS` exits with, in this process"""
    module, base = STAGES[stage]
    Once.held = False
    monkeypatch.setattr(sys, "argv", [module.__file__, *(f.format(F=F) for f in [*base, *flags])])
    with pytest.raises(SystemExit) as error:
        module.main(tyro.extras.overridable_config_cli(module.PRESETS, description=module.__doc__))
    return error.value.code


@pytest.mark.parametrize("stage, flags, words", CASES)
def test_bad_input(files, monkeypatch, capfd, stage, flags, words):
    monkeypatch.syspath_prepend(str(files))
    before = contents(files)
    # Bad files are tried in a new folder alone: all of them are read at the same place.
    bad_file = any("/checkpoint-" in flag or "/dataset-" in flag for flag in flags)
    folders = [["--run-dir", "{F}/new"], ["--run-dir", "{F}/old", "--overwrite"]]
    for run_dir in folders[: 1 if bad_file else 2]:
        if "--run-dir" in flags:
            run_dir = []
        with warnings.catch_warnings(record=True) as warned:
            code = attempt(monkeypatch, files, stage, [*run_dir, *flags])
        assert [
            str(w.message) for w in warned if w.category in (UserWarning, RuntimeWarning)
        ] == []  # would be further lines
        out, err = capfd.readouterr()
        if words:
            assert isinstance(code, str) and code.startswith("error: ") and "\n" not in code
            assert all(w in code for w in words), code
            assert err == ""
        else:
            assert code == 2 and out + err
        assert "Traceback" not in out + err
        assert contents(files) == before


GOOD_RANGE = {
    "kl": 1.0,
    "image error": [1.0, 2.0, 3.0],
    "vector error": [1.0, 2.0, 3.0],
    "posterior entropy": [1.0, 2.0, 3.0],
}


@pytest.mark.parametrize(
    "wrong",
    [
        [1],
        {},
        "range",
        GOOD_RANGE | {"kl": 0.0},
        GOOD_RANGE | {"kl": "1"},
        GOOD_RANGE | {"vector error": [1.0]},
        GOOD_RANGE | {"image error": [float("nan")] * 3},
    ],
)
def test_yardsticks_that_make_no_sense(files, tmp_path, monkeypatch, wrong):
    """of the source, in draw.pt: found before the training, not by the report after it"""
    save_checkpoint(tmp_path / "draw.pt", **tiny_checkpoint(source_range=wrong))
    code = attempt(
        monkeypatch,
        files,
        "adapt",
        ["--checkpoint", str(tmp_path / "draw.pt"), "--run-dir", str(tmp_path / "run")],
    )
    assert code.startswith("error: ") and "source_range" in code and not (tmp_path / "run").exists()


# ---- the same from outside, one of each kind


@pytest.mark.parametrize(
    "script, flags, words",
    [
        (
            "redraw_adapt",
            "--checkpoint {F}/checkpoint-trap-in-the-shell.pt --dataset {F}/data.npz",
            ["not a checkpoint"],
        ),
        (
            "redraw_adapt",
            "--checkpoint {F}/draw.pt --dataset {F}/dataset-trap.npz",
            ["allow_pickle"],
        ),
        (
            "train_policy",
            "--checkpoint {F}/checkpoint-truncated-to-0.5.pt --dataset {F}/data.npz",
            ["not a checkpoint"],
        ),
        (
            "train_policy",
            "--checkpoint {F}/draw.pt --dataset {F}/data.npz --eval-env-ids bad_env:Unmade-v0",
            ["bad_env:Unmade-v0"],
        ),
        ("draw_pretrain", "--env-id redraw/PendulumSwingup-v0 --image-size 1024", ["1024"]),
    ],
)
def test_bad_input_from_outside(files, script, flags, words):
    before = contents(files)
    base = {"draw_pretrain": PRETRAIN, "redraw_adapt": ADAPT, "train_policy": POLICY}[script]
    done = run(script, *base, *flags.format(F=files).split(), "--run-dir", files / "new", cwd=files)
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr.startswith("error: ")
        and done.stderr.count("\n") == 1
        and all(w in done.stderr for w in words)
    ), done.stderr
    assert contents(files) == before


def test_tyro_s_own_messages_from_outside(files):
    done = run(
        "train_policy",
        *POLICY,
        "--checkpoint",
        "a.pt",
        "--dataset",
        "b.npz",
        "--updates",
        "many",
        cwd=files,
    )
    assert (
        done.returncode == 2
        and "--updates" in done.stderr + done.stdout
        and "Traceback" not in done.stderr
    )


# ---- permissions: root has them all, so a test of root's gives them away for a moment


@contextlib.contextmanager
def unprivileged():
    """(a folder that everyone may enter) as a user who is not root"""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    root = os.geteuid() == 0
    try:
        yield folder, lambda: os.seteuid(65534) if root else None
    finally:
        if root:
            os.seteuid(0)
        for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
            path.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "mode, target, words",
    [
        (0o000, "draw.pt", ["draw.pt"]),
        (0o000, "data.npz", ["data.npz"]),
        (0o000, "locked", ["locked"]),
        (0o555, "locked", ["locked"]),
    ],
)
def test_no_permission(monkeypatch, mode, target, words):
    with unprivileged() as (F, give_away):
        save_tiny_draw(F / "draw.pt")
        save_dataset(F / "data.npz", random_rows(N))
        (F / "locked").mkdir()
        for path in F.iterdir():
            path.chmod(0o755)
        (F / target).chmod(mode)
        give_away()
        code = attempt(monkeypatch, F, "policy", ["--run-dir", "{F}/locked/run"])
        os.seteuid(os.getuid())
        assert code.startswith("error: ") and "\n" not in code and all(w in code for w in words), (
            code
        )
        (F / target).chmod(0o755)
        assert sorted(p.name for p in F.rglob("*")) == ["data.npz", "draw.pt", "locked"]


# ---- what the tables rest on


@pytest.mark.parametrize("name", [n for n in CHECKPOINTS if n.startswith("trap")])
def test_the_traps_of_checkpoints_are_real(files, tmp_path, name):
    """A careless loader would run their code, so it means something that ours did not."""
    data = CHECKPOINTS[name][0](tmp_path)
    pickle.loads(data) if name == "trap without torch" else torch.load(
        io.BytesIO(data), weights_only=False
    )
    assert (tmp_path / "ran").exists() and not (files / "ran").exists()


@pytest.mark.parametrize("name", [n for n in DATASETS if n.startswith("trap")])
def test_the_traps_of_datasets_are_real(files, tmp_path, name):
    loaded = np.load(io.BytesIO(DATASETS[name][0](random_rows(N), tmp_path)), allow_pickle=True)
    if isinstance(loaded, np.lib.npyio.NpzFile):
        dict(loaded)
    assert (tmp_path / "ran").exists() and not (files / "ran").exists()


def test_policies_are_read_with_the_same_care(files, tmp_path):
    for name, word in (("trap", "not a checkpoint"), ("NaN-policy", "finite")):
        path = files / ("NaN-policy.pt" if name == "NaN-policy" else file_name("checkpoint", name))
        with pytest.raises(SystemExit, match=word):
            load_policy(path)
    assert load_policy(files / "policy.pt").sizes == TINY
    assert not (files / "ran").exists()


def test_good_files_are_read(files):
    load_checkpoint(files / "draw.pt", ("draw_pretrain",))
    checkpoint = load_checkpoint(files / "adapted.pt", ("redraw_adapt",))
    load_rectified(checkpoint, load_draw(checkpoint))
    assert len(load_dataset(files / "data.npz", TINY)["is_first"]) == N


# ---- what is unusual and allowed


def test_actions_out_of_bounds_are_clipped_by_the_models():
    draw = DRAW(TINY)
    z, sigma = (
        torch.nn.functional.one_hot(torch.zeros(6, TINY.S, dtype=torch.long), TINY.K).float()
        for _ in range(2)
    )
    far, bound = torch.full((6, 1), -40.0), torch.full((6, 1), -1.0)
    assert torch.equal(draw.dynamics(z, sigma, far), draw.dynamics(z, sigma, bound))


def test_huge_numbers_are_no_reason_to_diverge(files, tmp_path):
    rows = random_rows(N)
    rows["vector"][:5], rows["action"][:5] = 1e30, -1e30
    save_dataset(tmp_path / "data.npz", rows)
    module, base = STAGES["adapt"]
    flags = [f.format(F=files) for f in base] + [
        "--dataset",
        str(tmp_path / "data.npz"),
        "--run-dir",
        str(tmp_path / "run"),
        "--updates",
        "20",
    ]
    module.main(tyro.extras.overridable_config_cli(module.PRESETS, args=flags))
    assert np.isfinite(metric(tmp_path / "run", "adapt/kl_train")).all()


@pytest.mark.parametrize(
    "name, word", [("LateNaN", "vector"), ("LateRewardNaN", "reward"), ("LateRewardInf", "reward")]
)
@pytest.mark.parametrize("stage, flag", [("pretrain", "--env-id"), ("collect", "--target-env-id")])
def test_an_environment_that_returns_nan(files, tmp_path, monkeypatch, name, word, stage, flag):
    """is named, with the number of steps, before anything wrong is stored. (An exception in an
    environment's code shows as it is: its author needs the traceback.)"""
    env_id = f"bad_env:{name}-v0"
    code = attempt(monkeypatch, files, stage, [flag, env_id, "--run-dir", str(tmp_path / "run")])
    assert code.startswith(f"error: {env_id}") and "\n" not in code
    assert word in code and "7 steps" in code
    assert not list(tmp_path.rglob("*.npz")) and not list(tmp_path.rglob("*.pt"))


def test_rewards_of_a_dataset_may_be_anything(files, tmp_path):
    """Neither stage 2 nor stage 3 uses them."""
    reward = np.full(N, -np.inf, np.float32)
    save_dataset(tmp_path / "data.npz", random_rows(N) | {"reward": reward})
    for stage in ("adapt", "policy"):
        module, base = STAGES[stage]
        given = ["--dataset", str(tmp_path / "data.npz"), "--run-dir", str(tmp_path / stage)]
        flags = [f.format(F=files) for f in base] + [*given, "--updates", "1"]
        module.main(tyro.extras.overridable_config_cli(module.PRESETS, args=flags))
