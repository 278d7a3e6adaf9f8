# make demo   the whole pipeline on one source/target pair (PAIR=pendulum, reacher, cup or finger)
# make test   the tests, without those that drive a Duckiebot or need its simulator: make test-duckiebot
# make bench  how fast each stage is on this machine; BENCH=--real times a whole laptop run too
# make duckietown           the whole chain on the Duckiebot simulator, small; SIZE=full: with the presets, an hour and a half
# make duckietown-install   only that simulator
# All create .venv and install what they need into it.

PYTHON ?= python3
PAIR ?= pendulum
SEED ?= 1
RUNS ?= runs/$(PAIR)-$(SEED)
PY = .venv/bin/python

# source and target of each pair
SOURCE_pendulum = redraw/PendulumSwingup-v0
TARGET_pendulum = redraw/PendulumSwingupReversed-v0
SOURCE_cup = redraw/BallInCupCatch-v0
TARGET_cup = redraw/BallInCupCatchWindy-v0
SOURCE_finger = redraw/FingerTurnHard-v0
TARGET_finger = redraw/FingerTurnHardTorque-v0
SOURCE_reacher = redraw/ReacherEasy-v0
TARGET_reacher = redraw/ReacherEasyReversed-v0
# Pictures with more in them than a pendulum want a larger model and more updates (10,000).
BIGGER = --cnn-depth 16 --units 256 --vector-scale 200 --train-every 2.4
SIZES_cup = $(BIGGER)
SIZES_finger = $(BIGGER)
SIZES_reacher = $(BIGGER)
# More flags for all runs of a stage, e.g. make demo STAGE3="--updates 6000"
STAGE1 =
STAGE2 =
STAGE3 =
SOURCE = $(SOURCE_$(PAIR))
TARGET = $(TARGET_$(PAIR))
ifeq ($(SOURCE),)
$(error PAIR must be pendulum, reacher, cup or finger, not '$(PAIR)')
endif

.PHONY: demo test bench test-duckiebot egl clean duckietown duckietown-install
.DELETE_ON_ERROR:
.SECONDARY:

# What rendering without a screen needs from a Debian system.
EGL_PACKAGES = libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri
egl:
	@PATH="$$PATH:/sbin:/usr/sbin"; if [ "$$(uname)" = Linux ] && ! { ldconfig -p | grep -q 'libEGL\.so\.1' && ldconfig -p | grep -q 'libGL\.so\.1' && ldconfig -p | grep -q 'libEGL_mesa\|libEGL_nvidia'; }; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -qq && apt-get install -y -qq $(EGL_PACKAGES); \
		else \
			echo "error: rendering needs EGL; run: sudo apt-get install $(EGL_PACKAGES)" >&2; exit 1; \
		fi; \
	fi

.venv/installed: requirements.txt | egl
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null || { echo "error: needs Python 3.11 or newer; give it as PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "error: no virtual environment; run: sudo apt-get install python3-venv" >&2; exit 1; }
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

test: .venv/installed
	$(PY) -m pytest tests -q -m "not timing" --ignore tests/robot/test_duckietown.py

# On a machine with nothing else to do.
bench: .venv/installed
	$(PY) tests/benchmarks/bench_run.py $(BENCH)

# What the clock decides, and what needs the simulator: on a machine with nothing else to do.
test-duckiebot: .venv/duckietown
	$(PY) -m pytest tests/robot/test_deploy.py tests/robot/test_duckietown.py -q

# Each stage is made once: an interrupted `make demo` goes on from its stages' last saves. Two trainings at a time, one thread each; the
# ceiling writes what it has to say into target.log, the source's policy into source-policy.log.
demo: export OMP_NUM_THREADS ?= 1
demo: .venv/installed
	@$(MAKE) --no-print-directory -j2 $(RUNS)/source-policy/done $(RUNS)/adapted-policy/done $(RUNS)/target-policy/done
	$(PY) docs/demo_table.py --seed $(SEED) --runs $(RUNS) --source $(SOURCE) --target $(TARGET)

# stage 1: the world model, in the source
$(RUNS)/source/done: | .venv/installed
	$(PY) draw_pretrain.py laptop $(SIZES_$(PAIR)) $(STAGE1) --env-id $(SOURCE) --seed $(SEED) --run-dir $(RUNS)/source --resume
	@touch $@
# stage 3: a policy for the source, evaluated there and, zero-shot, in the target
$(RUNS)/source-policy/done: $(RUNS)/source/done
	$(PY) train_policy.py laptop $(STAGE3) --checkpoint $(RUNS)/source/draw.pt --dataset $(RUNS)/source/replay \
		--eval-env-ids $(SOURCE) $(TARGET) --seed $(SEED) --run-dir $(RUNS)/source-policy --resume \
		> $(RUNS)/source-policy.log 2>&1 || { tail -n 1 $(RUNS)/source-policy.log >&2; exit 1; }
	@touch $@
# stage 2: the residual, from target data without rewards
$(RUNS)/adapted/done: $(RUNS)/source/done
	$(PY) redraw_adapt.py laptop $(STAGE2) --checkpoint $(RUNS)/source/draw.pt --target-env-id $(TARGET) \
		--seed $(SEED) --run-dir $(RUNS)/adapted --resume
	@touch $@
# stage 3: a policy for the target, in the rectified imagination
$(RUNS)/adapted-policy/done: $(RUNS)/adapted/done
	$(PY) train_policy.py laptop $(STAGE3) --checkpoint $(RUNS)/adapted/best.pt --dataset $(RUNS)/adapted/dataset.npz \
		--eval-env-ids $(TARGET) --seed $(SEED) --run-dir $(RUNS)/adapted-policy --resume
	@touch $@
# the ceiling: world model and policy trained in the target itself, with the same budget
LOG = $(RUNS)/target.log
$(RUNS)/target/done: | .venv/installed
	@mkdir -p $(RUNS)
	$(PY) draw_pretrain.py laptop $(SIZES_$(PAIR)) $(STAGE1) --env-id $(TARGET) --seed $(SEED) --run-dir $(RUNS)/target --resume \
		> $(LOG) 2>&1 || { tail -n 1 $(LOG) >&2; exit 1; }
	@touch $@
$(RUNS)/target-policy/done: $(RUNS)/target/done
	$(PY) train_policy.py laptop $(STAGE3) --checkpoint $(RUNS)/target/draw.pt --dataset $(RUNS)/target/replay \
		--eval-env-ids $(TARGET) --seed $(SEED) --run-dir $(RUNS)/target-policy --resume \
		>> $(LOG) 2>&1 || { tail -n 1 $(LOG) >&2; exit 1; }
	@touch $@

# The Duckiebot simulator. Its packages ask for versions that exclude each other, and ours, so pip takes them without what they
# ask for, after what they really need.
# pyglet 1.5, base58 below 2, PyContracts3 and gltflib are what the simulator's packages ask for; the others: as they were tried.
DUCKIETOWN_NEEDS = pyglet==1.5.31 networkx==3.6.1 PyContracts3==7.2 decorator==5.3.1 oyaml==1.0 base58==1.0.3 beautifulsoup4==4.15.0 coloredlogs==15.0.1 \
	frozendict==2.5.1 future==1.0.0 gltflib==1.0.13 mypy_extensions==1.2.0 pyparsing==3.3.3 pyzmq==27.3.0 six==1.17.0 svgwrite==1.4.3 termcolor==3.3.0 \
	trimesh==5.2.0 typing_extensions==4.16.0 webcolors==25.10.0 xtermcolor==1.3
DUCKIETOWN = duckietown-gym-daffy==6.1.34 duckietown-world-daffy==6.4.3 duckietown-serialization-ds1==1.1.1 aido-protocols-daffy==6.1.1 \
	PyGeometry-z6==2.1.5 carnivalmirror==0.6.2 zuper-commons-z6==6.2.4 zuper-typing-z6==6.2.3 zuper-nodes-z6==6.2.17
.venv/duckietown: .venv/installed
	@PATH="$$PATH:/sbin:/usr/sbin"; if [ "$$(uname)" = Linux ] && ! ldconfig -p | grep -q 'libGLU\.so\.1'; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && apt-get install -y -qq libglu1-mesa; \
		else echo "error: the simulator needs GLU; run: sudo apt-get install libglu1-mesa" >&2; exit 1; fi; \
	fi
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt $(DUCKIETOWN_NEEDS)
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps $(DUCKIETOWN)
	@touch $@
duckietown-install: .venv/duckietown

# Source: the simulator; target: the same with reversed actions (VARIANT=Miscalibrated: wheels and delay off), recorded through the loop that
# drives a robot: random actions, and the simulator's expert in the place of a person who drives by hand. Each stage is made once.
SIZE ?= small
VARIANT ?= Reversed
ifneq ($(filter duckietown,$(MAKECMDGOALS)),)
ifeq ($(and $(filter small full,$(SIZE)),$(filter Reversed Miscalibrated,$(VARIANT))),)
$(error SIZE must be small or full, not '$(SIZE)', VARIANT Reversed or Miscalibrated, not '$(VARIANT)')
endif
endif
TOWN_STAGE1_small = --steps 14000 --prefill 4000 --save-every 4000
TOWN_STAGE2_small = --updates 1000
TOWN_STAGE3_small = --updates 1000
TOWN = runs/duckietown-$(SIZE)-$(SEED)
TOWN_TARGET = redraw/Duckietown$(VARIANT)-v0
$(TOWN)/source/done: | .venv/duckietown
	$(PY) draw_pretrain.py duckietown $(TOWN_STAGE1_$(SIZE)) $(STAGE1) --env-id deploy_duckiebot:redraw/Duckietown-v0 --seed $(SEED) --run-dir $(TOWN)/source --resume
	@touch $@
$(TOWN)/$(VARIANT)/data/%.npz: | .venv/duckietown
	@mkdir -p $(@D)
	$(PY) deploy_duckiebot.py --seed $(SEED) --env-id $(TOWN_TARGET) --drive $* --max-seconds 500 --image-size 32 --record $@
$(TOWN)/$(VARIANT)/adapted/done: $(TOWN)/source/done $(TOWN)/$(VARIANT)/data/random.npz $(TOWN)/$(VARIANT)/data/expert.npz
	$(PY) redraw_adapt.py duckietown $(TOWN_STAGE2_$(SIZE)) $(STAGE2) --checkpoint $(TOWN)/source/draw.pt --dataset $(TOWN)/$(VARIANT)/data --seed $(SEED) \
		--run-dir $(TOWN)/$(VARIANT)/adapted --resume
	@touch $@
$(TOWN)/$(VARIANT)/policy/done: $(TOWN)/$(VARIANT)/adapted/done
	$(PY) train_policy.py duckietown $(TOWN_STAGE3_$(SIZE)) $(STAGE3) --checkpoint $(TOWN)/$(VARIANT)/adapted/best.pt --dataset $(TOWN)/$(VARIANT)/data --seed $(SEED) \
		--run-dir $(TOWN)/$(VARIANT)/policy --resume
	@touch $@
duckietown: export OMP_NUM_THREADS ?= 1
duckietown: $(TOWN)/$(VARIANT)/policy/done
	$(PY) deploy_duckiebot.py --seed $(SEED) --env-id $(TOWN_TARGET) --checkpoint $(TOWN)/$(VARIANT)/policy/policy.pt --max-seconds 200

clean:
	rm -rf .venv runs
