"""Tiny PEFT adapters with random B for the golden models, and the logits PEFT computes with them.

    python make.py GOLDEN/hf            # writes the folders beside this file (made with peft 0.21.2)
    python make.py GOLDEN/hf ADAPTER…   # compares: ADAPTER is a folder beside a like-named golden one,
                                        # as Tercet wrote it (see peft.rs); prints how far logits are

A golden folder is NAME/{adapter_config.json, adapter_model.safetensors, expected.safetensors}; the base's
name is the part of NAME before the first dash.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
CASES = {
    "llama-rslora": dict(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "v_proj", "mlp.down_proj"]),
    "qwen2-dropout": dict(r=3, lora_alpha=12, lora_dropout=0.1, target_modules="all-linear"),
    "gpt2-fused": dict(r=4, lora_alpha=8, fan_in_fan_out=True, target_modules=["c_attn", "c_proj"]),
}


def base(hf, name):
    return AutoModelForCausalLM.from_pretrained(hf / name.split("-")[0], dtype=torch.float32).eval()


@torch.no_grad()
def make(hf, name, config):
    torch.manual_seed(len(name))
    model = get_peft_model(base(hf, name), LoraConfig(task_type="CAUSAL_LM", **config))
    for key, value in model.named_parameters():
        if "lora_B" in key:
            value.normal_(std=0.1)
    model.eval().save_pretrained(HERE / name)
    (HERE / name / "README.md").unlink(missing_ok=True)
    settings = json.loads((HERE / name / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = name.split("-")[0]
    if isinstance(settings["target_modules"], list):
        settings["target_modules"].sort()
    (HERE / name / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    ids = torch.randint(model.config.vocab_size, (2, 24))
    expected = {"input_ids": ids, "logits": model(ids).logits.contiguous()}
    save_file(expected, HERE / name / "expected.safetensors")


@torch.no_grad()
def compare(hf, folder):
    expected = load_file(HERE / folder.name / "expected.safetensors")
    model = base(hf, folder.name)
    alone = model(expected["input_ids"]).logits
    logits = PeftModel.from_pretrained(model, folder).eval()(expected["input_ids"]).logits
    off = [(other - expected["logits"]).abs().max().item() for other in (logits, alone)]
    print(f"{folder.name}: {off[0]:.1e} (without the adapter {off[1]:.1e})")


if __name__ == "__main__":
    hf, folders = Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]]
    for name, config in [] if folders else CASES.items():
        make(hf, name, config)
    for folder in folders:
        compare(hf, folder)
