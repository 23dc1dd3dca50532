"""`llama-quantize` for those who have llama-cpp-python alone.

Run as `python -m hifiprune.deployment.llama_quantize SOURCE TARGET TYPE`.
"""

import sys


def main(source: str, target: str, wanted: str) -> int:
    """Quantize a GGUF file by the library inside llama-cpp-python; returns the exit code.

    Args:
        source: a GGUF file of 16 or 32 bits.
        target: the file to make.
        wanted: name of the type, such as Q4_K_M.
    """
    import llama_cpp  # not a dependency: whoever asks for it has it

    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{wanted}")
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), how))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
