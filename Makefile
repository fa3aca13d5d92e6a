# Each target makes its environment itself (see tools/environment.py).
PYTHON ?= python3
PORT ?=
DIR ?=
IMAGE ?=
OUT ?=
GPU ?=
PHOTOS ?=
STEPS ?= full
MINUTES ?=
INIT ?=
CLEAN ?=
PAIRS ?=
PROMPTS ?=
LIMIT ?=
ARGS ?=

.DELETE_ON_ERROR:
.PHONY: help demo demo-cluster restore serve test test-all lint fuzz soak nano evaluate ablate bench bench-train

help:
	@echo "make demo  [IMAGE=photo.jpg] [OUT=demo_out] [GPU=1]   restore photos with Nano"
	@echo "make demo-cluster                                     20 photos, two Ray nodes, one of which dies"
	@echo "make restore PHOTOS=folder [OUT=restored] [ARGS=..]   restore many photos"
	@echo "make serve [PORT=8188] [DIR=folder] [GPU=1] [ARGS=..] ComfyUI with this pack"
	@echo "make test | test-all | lint                           checks"
	@echo "make fuzz  [MINUTES=10] [ARGS=..]                     random files, photos, values, servers"
	@echo "make soak  [PROMPTS=1000] [OUT=soak_out] [ARGS=..]    many prompts on one server"
	@echo "make nano  PHOTOS=folder [STEPS=tiny | MINUTES=90] [INIT=nano.safetensors] [ARGS=..]"
	@echo "                                                      train Nano from clean photos, or fit one to them"
	@echo "make evaluate CLEAN=folder [PAIRS=folder] [OUT=eval_out]  score Nano through ComfyUI"
	@echo "make ablate   CLEAN=folder [LIMIT=10] [OUT=ablation_out]  what each part is worth"
	@echo "make bench    [OUT=bench_out] [ARGS=..]              the nodes against the host's own"
	@echo "make bench-train [ARGS=..]                            stage 1 against diffusers' ControlNet step"

# Paths are read by the shell ("$$PHOTOS"), not put into its text, where a name could be a command.

# The set-up prints its progress on stderr and the environment's interpreter on stdout.
define in_environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "3.11".split("."))))' 2>/dev/null || { \
  echo "error: '$(PYTHON)' is missing or older than Python 3.11 ($$($(PYTHON) --version 2>&1))." \
    "Name another one: make $@ PYTHON=/path/to/python3" >&2; exit 1; }
@python=$$($(PYTHON) -m tools.host setup --stage $(1)) || exit 1; $(2)
endef

demo:
	$(call in_environment,run,"$$python" -m tools.demo --out "$${OUT:-demo_out}" \
	  $(if $(IMAGE),--image "$$IMAGE") $(if $(PORT),--port $(PORT)) $(if $(GPU),--gpu))

demo-cluster:
	$(call in_environment,dev,exec "$$python" -m pytest tests/e2e/test_cluster.py -s -k half_way $(ARGS))

restore:
	@test -n "$$PHOTOS" || { echo "error: name a photo or a folder: make restore PHOTOS=/path" >&2; exit 1; }
	$(call in_environment,run,exec "$$python" -m tools.restore "$$PHOTOS" \
	  --out "$${OUT:-restored}" $(if $(GPU),--gpu) $(ARGS))

serve:
	$(call in_environment,run,exec "$$python" -m tools.host serve \
	  $(if $(PORT),--port $(PORT)) $(if $(DIR),--dir "$$DIR") $(if $(GPU),--gpu) $(if $(ARGS),-- $(ARGS)))

# Two processes, each on a core, take half the time; a file's tests share its servers and models.
PYTEST = OMP_NUM_THREADS=1 exec "$$python" -m pytest tests -n 2 --dist loadfile

test:
	$(call in_environment,dev,$(PYTEST) -m "not slow and not gpu and not weights" $(ARGS))

test-all:
	$(call in_environment,dev,$(PYTEST) $(ARGS))

# ComfyUI on the path lets pyright check the nodes against the host's own classes.
lint:
	$(call in_environment,dev,set -e; "$$python" -m ruff check .; "$$python" -m ruff format --check .; \
	  PYTHONPATH="$$("$$python" -m tools.host root)" "$$python" -m pyright --pythonpath "$$python")

fuzz:
	$(call in_environment,dev,exec "$$python" -m tests.fuzz $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS))

soak:
	$(call in_environment,dev,exec "$$python" -m tests.fuzz.soak --out "$${OUT:-soak_out}" \
	  $(if $(PROMPTS),--prompts $(PROMPTS)) $(ARGS))

nano:
	@test -n "$$PHOTOS" || { echo "error: name a folder of clean photos: make nano PHOTOS=/path" >&2; exit 1; }
	$(call in_environment,dev,exec "$$python" -m training.nano --photos "$$PHOTOS" --steps $(STEPS) \
	  $(if $(MINUTES),--minutes $(MINUTES)) $(if $(INIT),--init "$$INIT",--vae None) $(ARGS))

evaluate:
	@test -n "$$CLEAN" || { echo "error: name a folder of clean photos: make evaluate CLEAN=/path" >&2; exit 1; }
	$(call in_environment,dev,exec "$$python" -m training.evaluate --data.clean "$$CLEAN" \
	  $(if $(PAIRS),--data.pairs "$$PAIRS") $(if $(LIMIT),--data.limit $(LIMIT)) \
	  --out "$${OUT:-eval_out}" $(if $(GPU),--gpu) $(ARGS))

ablate:
	@test -n "$$CLEAN" || { echo "error: name a folder of clean photos: make ablate CLEAN=/path" >&2; exit 1; }
	$(call in_environment,dev,exec "$$python" -m training.ablate --data.clean "$$CLEAN" \
	  $(if $(LIMIT),--data.limit $(LIMIT)) \
	  --out "$${OUT:-ablation_out}" $(ARGS))

bench:
	$(call in_environment,dev,exec "$$python" -m benchmarks \
	  --out "$${OUT:-bench_out}" $(ARGS))

bench-train:
	$(call in_environment,dev,exec "$$python" -m training.bench $(ARGS))
