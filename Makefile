# make install   creates .venv and installs this package and what it needs (requirements.txt) into it
# make demo      installs, draws small data, fine-tunes the demo's checkpoint on a GPU or a CPU, and evaluates it before
#                and after; choose with TASK=ucf101|docvqa|hateful_memes|nlvr2 and MODE=full|frozen|lora|qlora
# make test      installs what the tests need, checks style and format, and runs the tests in two processes, on a CPU and
#                offline; WORKERS=4 takes four processes, and WORKERS=0 one
# make gpu-report  proves on this machine's GPU what the documentation says, and writes output/gpu-report/report.md; give
#                flags with FLAGS="--stages right --minutes 10"
# make test-browser   drives the page of `tools/ask.py --serve` in Chromium, which it takes from the system, or else from
#                Playwright in .venv-browser
# make shared    copies the blocks between `# shared:` and `# end shared` from finetune_hf_trainer_docvqa.py to the other
#                training scripts
# make test-oldest   installs the lower bounds of requirements.txt into .venv-oldest (about 6 GB), and runs the tests of
#                the model, the data and the training with them
#
# PYTHON=python3.12 chooses the Python that creates .venv. A .venv that exists is used as it is.
PYTHON ?= python3
BIN := .venv/bin
TASK ?= ucf101
MODE ?= full
WORKERS ?= 2
DATA := output/demo/data/$(TASK)
OUT := output/demo/$(TASK)-$(MODE)

FLAGS_ucf101 := --num_crops 1 --learning_rate 1e-3 --num_train_epochs 6
FLAGS_docvqa := --num_crops 3 --learning_rate 2e-3 --num_train_epochs 6
FLAGS_hateful_memes := --num_crops 1 --learning_rate 1e-3 --num_train_epochs 4
FLAGS_nlvr2 := --num_crops 1 --learning_rate 1e-3 --num_train_epochs 2
FLAGS_full :=
FLAGS_frozen := --freeze_vision_model
FLAGS_lora := --use_lora --learning_rate 2e-3
FLAGS_qlora := --use_qlora --learning_rate 2e-3

.PHONY: demo check-demo install test test-browser test-oldest gpu-report shared

demo: check-demo .venv/installed $(DATA)/made
	@echo "== fine-tuning demo/base_checkpoint: TASK=$(TASK) MODE=$(MODE), one process per GPU or two on a CPU"
	rm -rf $(OUT)
	n=$$($(BIN)/python -c "import torch; n = torch.accelerator.device_count() or 2; \
		print(next(k for k in (16, 8, 4, 2, 1) if k <= n))") && \
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=$$n \
		finetune_hf_trainer_$(TASK).py --model_name_or_path demo/base_checkpoint --data_dir $(DATA) \
		--output_dir $(OUT) --fp32 --batch_size 16 --batch_size_per_gpu $$((16 / n)) --dataloader_num_workers 1 \
		$(FLAGS_$(TASK)) $(FLAGS_$(MODE))

check-demo:
	@test -n "$(filter ucf101 docvqa hateful_memes nlvr2,$(TASK))" || \
		{ echo "error: TASK=$(TASK) is unknown: ucf101, docvqa, hateful_memes or nlvr2"; exit 2; }
	@test -n "$(filter full frozen lora qlora,$(MODE))" || \
		{ echo "error: MODE=$(MODE) is unknown: full, frozen, lora or qlora"; exit 2; }

output/demo/data/ucf101/made: demo/make_data.py demo/digits.py convert_ucf101.py | .venv/installed
	@echo "== drawing videos of handwritten digits that move, and converting them to frames and conversations"
	rm -rf $(@D)
	$(BIN)/python demo/make_data.py --task ucf101 --out_dir output/demo/videos
	$(BIN)/python convert_ucf101.py --source output/demo/videos/UCF101_subset.tar.gz --out_dir $(@D)
	@touch $@

output/demo/data/%/made: demo/make_data.py demo/digits.py | .venv/installed
	@echo "== drawing handwritten digits for $*"
	rm -rf $(@D)
	$(BIN)/python demo/make_data.py --task $* --out_dir $(@D)
	@touch $@

install: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	@echo "== installing this package and what it needs into .venv (some minutes, about 6 GB)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install -q -e '.[test]'
	touch $@

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q --durations=10 \
		-n $(WORKERS) --dist loadfile --no-loadscope-reorder

.venv-browser/installed:
	test -x .venv-browser/bin/python || $(PYTHON) -m venv .venv-browser
	.venv-browser/bin/pip install -q playwright pillow
	test -n "$$(command -v chromium chromium-browser google-chrome)" || .venv-browser/bin/playwright install chromium
	touch $@

test-browser: .venv/installed-test .venv-browser/installed
	.venv-browser/bin/python tests/browser/served_page.py

gpu-report: .venv/installed
	$(BIN)/python benchmarks/gpu_report.py $(FLAGS)

.venv-oldest/installed: requirements.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	sed -nE 's/^([a-z_]+)>=([^,]+).*/\1==\2/p' requirements.txt > .venv-oldest/requirements.txt
	.venv-oldest/bin/pip install -q -r .venv-oldest/requirements.txt 'pytest>=9' pytest-xdist hypothesis jsonschema
	touch $@

test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-oldest/bin/python -m pytest -q tests/test_old_versions.py tests/test_hub_faults.py \
		tests/model tests/data tests/training

shared:
	$(PYTHON) tools/shared_blocks.py
