# make duckietown: stages 2 and 3 in the shipped model of the Duckiebot simulator, then a drive.
# SIZE=full trains a model first; SIZE=small does all with few updates, to see that the chain works.
# The target's data is recorded by the loop that drives a robot: 5,000 steps of random driving, 5,000
# of a disturbed expert.
SIZE ?= shipped
VARIANT ?= Reversed
TOWN = runs/duckietown-$(SIZE)-$(SEED)
T = $(TOWN)/$(VARIANT)
TOWN1_small = --steps 14000 --prefill 4000 --save-every 4000
TOWN2_small = --updates 1000
TOWN3_small = --updates 100
TOWN_MODEL = $(if $(filter shipped,$(SIZE)),docs/pretrained/duckietown.pt,$(TOWN)/source/draw.pt)
DRIVE = $(PY) deploy_duckiebot.py --seed $(SEED) --env-id redraw/Duckietown$(VARIANT)-v0
duckietown: size $(T)/policy/done
	$(DRIVE) --checkpoint $(T)/policy/policy.pt --max-seconds 200
size:
	$(if $(filter shipped small full,$(SIZE)),,$(error SIZE must be shipped, small or full, not '$(SIZE)'))
$(TOWN)/source/done: | .venv/duckietown
	$(PY) draw_pretrain.py duckietown $(TOWN1_$(SIZE)) $(STAGE1) --run-dir $(TOWN)/source $(COMMON)
	@touch $@
$(T)/data/%.npz: | .venv/duckietown
	@mkdir -p $(@D) $(T)/part
	$(DRIVE) --drive $* $(if $(filter expert,$*),--disturbed) --max-seconds 500 --image-size 32 \
		--record $(T)/part/$(@F)
	@mv $(T)/part/$(@F) $@
$(T)/adapted/done: $(if $(filter shipped,$(SIZE)),,$(TOWN)/source/done) $(T)/data/random.npz $(T)/data/expert.npz
	$(PY) redraw_adapt.py duckietown $(TOWN2_$(SIZE)) $(STAGE2) --checkpoint $(TOWN_MODEL) \
		--dataset $(T)/data --run-dir $(T)/adapted $(COMMON)
	@touch $@
$(T)/policy/done: $(T)/adapted/done
	$(PY) train_policy.py duckietown $(TOWN3_$(SIZE)) $(STAGE3) --checkpoint $(T)/adapted/best.pt \
		--dataset $(T)/data --run-dir $(T)/policy $(COMMON)
	@touch $@
