# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` do all the set-up they need, once. Variables: see projects/DeformableConvNets/dev/setup.sh.

PROJECT := projects/DeformableConvNets
VENV ?= .venv
RUN := "$$VENV/bin/python"
DEMO := $(PROJECT)/examples/nuclei_faster_rcnn_slim_R_50_FPN_mdconv_c3-c5.yaml
OUTPUT ?= output/demo

export VENV OUTPUT
# VENV as make writes a file name: in VENV="/my disk/env", the space would end it.
blank := $() $()
STAMPS := $(subst $(blank),\ ,$(VENV))
SOURCES := $(shell find $(PROJECT)/csrc -type f) $(PROJECT)/setup.py $(PROJECT)/pyproject.toml
PINS := $(addprefix $(PROJECT)/dev/,requirements.txt constraints.txt detectron2.txt pins.py)

.PHONY: help setup demo test clean FORCE

help:
	@echo "make demo    train a deformable Faster R-CNN on microscopy images of nuclei, evaluate it, draw pictures"
	@echo "make test    all checks: linters, types, README, tests"
	@echo "make setup   only the set-up that both of them do when it is needed"
	@echo "make clean   remove the environment and all that was built"

# With all cores, but threads that wait sleep instead of spinning: on a machine that also does other things, spinning
# made an iteration five times as long.
demo: export OMP_WAIT_POLICY ?= PASSIVE
demo: setup
	$(RUN) $(PROJECT)/train_net.py --config-file $(DEMO) --overwrite OUTPUT_DIR "$$OUTPUT"
	$(RUN) $(PROJECT)/demo.py --config-file $(DEMO) --weights "$$OUTPUT/model_final.pth" --output "$$OUTPUT/pictures" \
		--stretch-contrast

test: setup
	$(PROJECT)/dev/check.sh $(ARGS)

setup: $(STAMPS)/.ready

$(STAMPS)/.packages: $(PINS)
	@$(PROJECT)/dev/setup.sh packages
	@touch "$@"

$(STAMPS)/.ready: $(STAMPS)/.packages $(STAMPS)/.build-flags $(SOURCES)
	@$(PROJECT)/dev/setup.sh extension
	@touch "$@"

# Rewritten only when one of the variables has another value than at the last build. It comes after .packages,
# which makes the folder.
$(STAMPS)/.build-flags: $(STAMPS)/.packages FORCE
	@flags="FORCE_CUDA=$$FORCE_CUDA TORCH_CUDA_ARCH_LIST=$$TORCH_CUDA_ARCH_LIST NVCC_FLAGS=$$NVCC_FLAGS"; \
	flags="$$flags DEBUG=$$DEBUG DCN_WERROR=$$DCN_WERROR CXX=$$CXX"; \
	[ "$$flags" = "$$(cat "$@" 2>/dev/null)" ] || echo "$$flags" > "$@"

clean:
	rm -rf .venv output $(PROJECT)/build $(PROJECT)/dcn_d2.egg-info $(PROJECT)/dcn_d2/_C*.so
