"""GPT-2-architecture text generation: `gpt.load(path).generate(["Once upon a time"])`."""

from pathlib import Path
from typing import TYPE_CHECKING

from gpt.errors import Error, InputError, IntegrityError, NonFiniteError, ResourceError

if TYPE_CHECKING:
    from gpt.generate.generator import TextGenerator

__all__ = ["Error", "InputError", "IntegrityError", "NonFiniteError", "ResourceError", "load"]
__version__ = "0.1.0"


def load(
    path: str | Path, device: str = "auto", dtype: str = "auto", quantize: str = "none", backend: str = "auto"
) -> "TextGenerator":
    """Returns the TextGenerator of a checkpoint: a step folder or run folder of this project (its best step, else its
    newest), a Hugging Face GPT-2 folder, or a hub name such as "gpt2". The other arguments take the values of the
    options of sample.py. On a CPU the first use of this version builds the C++ kernels in the background; with "native"
    it waits for them. Raises InputError if there is no such checkpoint, IntegrityError if it is damaged."""
    import gpt.kernels.waiting  # noqa: F401 (before torch)

    from gpt.generate.generator import TextGenerator  # imports torch, which `import gpt` alone must not

    return TextGenerator.load(path, device, dtype, quantize, backend)
