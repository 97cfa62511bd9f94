"""Models on the Hugging Face hub, downloaded into its cache."""

import functools
import os
import re
from pathlib import Path

from gpt.checkpoint.adapters import ADAPTER, PICKLED_ADAPTER
from gpt.checkpoint.weights import INDEX, PICKLED_INDEX, WEIGHTS
from gpt.errors import InputError, ResourceError
from gpt.text.added_tokens import TEMPLATE_FILE
from gpt.text.foreign import ADAPTER_CONFIG, TOKENIZER_FILES

NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?\Z")
SETTINGS = ["config.json", "generation_config.json", ADAPTER_CONFIG, *TOKENIZER_FILES, TEMPLATE_FILE]
FILES = ["*.safetensors", INDEX, *SETTINGS]
PICKLES = ["pytorch_model*.bin", PICKLED_INDEX, PICKLED_ADAPTER]  # fetched if there are no weights in safetensors
TIMEOUT_SECONDS = 10  # for the hub's first answer


def is_hub_name(text: str) -> bool:
    """Returns whether `text` can name a model on the hub, such as "gpt2" or "org/name". A path in out/ cannot: it is a
    run folder."""
    return bool(NAME.match(text)) and not text.startswith("out/")


def fetch_from_hub(name: str) -> Path:
    """Returns the local folder of a model on the hub. Downloads the model over https into Hugging Face's cache, its
    pickled weights only if it has no others; without a connection, uses the copy in the cache. Raises InputError for an
    unknown name, ResourceError if the hub cannot be reached and the cache lacks the model."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError

    unknown = InputError(f"{name}: neither a folder here nor a model on the hub; check the name")
    # The hub's `*` matches slashes too: ignore files in subfolders.
    download = functools.partial(snapshot_download, name, ignore_patterns=["*/*"])
    try:
        info = HfApi().model_info(name, timeout=TIMEOUT_SECONDS)  # snapshot_download alone waits for ever
        files = {file.rfilename for file in info.siblings or []}
        wanted = FILES if files & {WEIGHTS, INDEX, ADAPTER} else FILES + PICKLES
        return Path(download(allow_patterns=wanted, etag_timeout=TIMEOUT_SECONDS))
    except HFValidationError:
        raise unknown from None
    except (HTTPError, OSError) as error:
        problem = error
    try:
        return Path(download(allow_patterns=FILES, local_files_only=True))
    except OSError:
        if isinstance(problem, RepositoryNotFoundError):
            raise unknown from None
        reason = str(problem).split("\n")[0]
        raise ResourceError(f"{name}: not in the cache, and the hub cannot be reached ({reason}); go online") from None
