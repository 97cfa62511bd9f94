"""GPT-2-architecture text generation: `gpt.load(path).generate(["Once upon a time"])`."""

from gpt.errors import Error, InputError, IntegrityError, NonFiniteError, ResourceError

__all__ = ["Error", "InputError", "IntegrityError", "NonFiniteError", "ResourceError", "load"]
__version__ = "0.1.0"


def load(path, device="auto", dtype="auto", quantize="none", backend="auto"):
    """The TextGenerator of a checkpoint: one of ours (a step folder, or a run folder's best, else latest), any Hugging
    Face GPT-2 folder, or a hub name such as "gpt2". `quantize` is "none" or "int8"; `backend` as in sample.py."""
    from gpt.generate.generator import (
        TextGenerator,  # importing gpt alone stays cheap: no torch until a model is asked for
    )

    return TextGenerator.load(path, device, dtype, quantize, backend)
