"""A LoRA adapter, weights placed by accelerate and an ordinary pipeline: hfkv is one more line.

    python examples/pipeline_lora_device_map.py [ADAPTER]

ADAPTER is a folder or a Hub name; its own base model is loaded. Without it the bundled model gets a random one.
"""

import sys
import tempfile

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import hfkv
from hfkv import tiny_lm


def save_random_adapter(folder):
    """Stand in for the adapter you have trained."""
    model = AutoModelForCausalLM.from_pretrained(tiny_lm.PATH)
    model = get_peft_model(model, LoraConfig(r=8, task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    return folder


# The code you have:
adapter = sys.argv[1] if len(sys.argv) > 1 else save_random_adapter(tempfile.mkdtemp())
base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
model = AutoModelForCausalLM.from_pretrained(base, device_map="auto")
model = PeftModel.from_pretrained(model, adapter)
pipe = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(base))

# The line you add: every cache from here on takes about half the memory of a 16-bit one.
print(hfkv.patch(model, kv="int8"))

prompts = ["def main():\n", "import os\n\nfor name in os.listdir("]
for outputs in pipe(prompts, batch_size=2, max_new_tokens=60, do_sample=False):
    print("-" * 40, outputs[0]["generated_text"], sep="\n")
