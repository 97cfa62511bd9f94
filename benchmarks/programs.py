"""The programs whose generation is compared. All have the same interface: load a folder, `generate` ids from ids.

generate(prompts, new_tokens, greedy) takes lists of ids, all of one length, and returns the `new_tokens` ids that
follow each; end-of-text does not end a text. Without `greedy` it samples with top-k 50, top-p 0.95, temperature 1."""

import importlib.util
import json
import math
import re
from pathlib import Path
from types import ModuleType

import weights
from gauges import Clock, release

TOP_K, TOP_P, TEMPERATURE = 50, 0.95, 1.0


class Ours:
    """This project's TextGenerator. Options: a dtype, "int8" and a back end, in any order."""

    def __init__(self, folder, options, threads, device):
        import short_spins  # noqa: F401 (before torch)

        import gpt
        from gpt.device import set_threads
        from gpt.generate.generator import TextGenerator
        from gpt.kernels.build import build_now

        set_threads(threads)
        if device == "cpu" and not {"eager", "compiled"} & set(options):
            build_now()  # otherwise the first texts come without the kernels
        self.generator, self.version = TextGenerator.load(folder, device, **form_settings(options)), gpt.__version__

    def generate(self, prompts, new_tokens, greedy):
        texts = [self.generator.tokenizer.decode(prompt) for prompt in prompts]
        sampling = {"temperature": TEMPERATURE, "top_k": TOP_K, "top_p": TOP_P, "seed": 1}
        sampling = {"temperature": 0.0} if greedy else sampling
        completions = self.generator.generate(
            texts, max_new_tokens=new_tokens, ignore_eot=True, rows=len(prompts), **sampling
        )
        return [completion.ids for [completion] in completions]


def form_settings(options: list[str]) -> dict[str, str]:
    """Returns the settings of TextGenerator.load for words such as "bf16", "int8" and "native"."""
    names = {"int8": "quantize", "fp32": "dtype", "bf16": "dtype", "fp16": "dtype"}
    return {names.get(option, "backend"): option for option in options}


class Transformers:
    """`generate` of transformers, with its cache. Options: fp32, bf16 or fp16."""

    def __init__(self, folder, options, threads, device):
        import torch
        import transformers

        torch.set_num_threads(threads)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options[0]]
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        model.generation_config.eos_token_id = None
        self.torch, self.model, self.version = torch, model, transformers.__version__

    def generate(self, prompts, new_tokens, greedy):
        ids = self.torch.tensor(prompts, device=self.model.device)
        sampling = {"do_sample": True, "top_k": TOP_K, "top_p": TOP_P, "temperature": TEMPERATURE}
        sampling = {"do_sample": False, "top_k": None, "top_p": None, "temperature": None} if greedy else sampling
        mask = self.torch.ones_like(ids)
        with self.torch.inference_mode():
            rows = self.model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, pad_token_id=0, **sampling)
        return rows[:, ids.shape[1] :].tolist()


class NanoGPT:
    """`GPT.generate` of nanoGPT's model.py, in fp32 as its sample.py runs on a CPU. It has no top-p. Option: the path
    of a checkout."""

    def __init__(self, folder, options, threads, device):
        import torch

        torch.set_num_threads(threads)
        self.torch, self.device, self.version = torch, device, "checkout"
        self.model = nanogpt_model(nanogpt_module(options[0]), folder).to(device).eval()

    def generate(self, prompts, new_tokens, greedy):
        ids = self.torch.tensor(prompts, device=self.device)
        with self.torch.inference_mode():
            rows = self.model.generate(ids, new_tokens, temperature=TEMPERATURE, top_k=1 if greedy else TOP_K)
        return rows[:, ids.shape[1] :].tolist()


def nanogpt_module(checkout: str | Path) -> ModuleType:
    """Returns the module model.py of a checkout of nanoGPT."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", f"{checkout}/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nanogpt_model(module: ModuleType, folder: Path, padded_to: int = 1):
    """Returns nanoGPT's GPT in fp32 with the weights of `folder`. Rows of zeros pad its vocabulary to a multiple of
    `padded_to`."""
    from safetensors.torch import load_file
    from torch.nn.functional import pad

    stored = json.loads((folder / "config.json").read_text())
    sizes = {name: stored[name] for name in ("n_layer", "n_head", "n_embd")}
    sizes["vocab_size"] = math.ceil(stored["vocab_size"] / padded_to) * padded_to
    model = module.GPT(module.GPTConfig(block_size=stored["n_positions"], dropout=0.0, bias=True, **sizes))
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = load_file(folder / "model.safetensors")
    state = {name: value.t() if name.endswith(transposed) else value for name, value in state.items()}
    table = pad(state["transformer.wte.weight"], (0, 0, 0, sizes["vocab_size"] - stored["vocab_size"]))
    state["lm_head.weight"] = state["transformer.wte.weight"] = table
    missing, unknown = model.load_state_dict(state, strict=False)
    assert not unknown and all(name.endswith("attn.bias") for name in missing), (missing, unknown)
    return model


class CTranslate2:
    """CTranslate2's Generator. Options: one of its compute types (float32, int8, …), or fp32, bf16, fp16."""

    def __init__(self, folder, options, threads, device):
        import ctranslate2

        compute_type = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(options[0], options[0])
        converted = weights.for_ctranslate2(folder)
        self.model = ctranslate2.Generator(
            str(converted), device=device, compute_type=compute_type, intra_threads=threads, inter_threads=1
        )
        self.words = json.loads((converted / "vocabulary.json").read_text(encoding="utf-8"))
        self.version = ctranslate2.__version__

    def generate(self, prompts, new_tokens, greedy):
        sampling = {"sampling_topk": TOP_K, "sampling_topp": TOP_P, "sampling_temperature": TEMPERATURE}
        results = self.model.generate_batch(
            [[self.words[i] for i in prompt] for prompt in prompts],
            min_length=new_tokens,
            max_length=new_tokens,
            include_prompt_in_result=False,
            **({} if greedy else sampling),
        )
        return [result.sequences_ids[0] for result in results]


class OpenVINO:
    """LLMPipeline of OpenVINO GenAI. Options: fp32, bf16 (from a file in fp16) or int8 (weights only), and the path of
    optimum-cli."""

    def __init__(self, folder, options, threads, device):
        import openvino
        import openvino_genai

        stored, hint = {"fp32": ("fp32", "f32"), "bf16": ("fp16", "bf16"), "int8": ("int8", "bf16")}[options[0]]
        converted = weights.for_openvino(folder, stored, *options[1:])
        place = {"cpu": "CPU", "cuda": "GPU"}[device]
        self.pipeline = openvino_genai.LLMPipeline(
            str(converted), place, INFERENCE_NUM_THREADS=threads, INFERENCE_PRECISION_HINT=hint
        )
        self.openvino, self.genai, self.version = openvino, openvino_genai, openvino_genai.__version__

    def generate(self, prompts, new_tokens, greedy):
        import numpy as np

        ids = np.array(prompts, dtype=np.int64)
        tokens = self.genai.TokenizedInputs(self.openvino.Tensor(ids), self.openvino.Tensor(np.ones_like(ids)))
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, not greedy
        if not greedy:
            config.top_k, config.top_p, config.temperature = TOP_K, TOP_P, TEMPERATURE
        return [list(row) for row in self.pipeline.generate(tokens, config).tokens]


class LlamaCpp:
    """llama.cpp through the C interface of llama-cpp-python, whose Python class takes no batches. Options: f32, f16 or
    q8_0. The cache is in F16, llama.cpp's default. `version` also names what it was built with, such as AVX2."""

    CONTEXT = 1024

    def __init__(self, folder, options, threads, device):
        import llama_cpp

        built_with = re.findall(r"(\w+) = 1", llama_cpp.llama_print_system_info().decode())
        self.api, self.version = llama_cpp, f"{llama_cpp.__version__} ({' '.join(built_with)})"
        path = weights.for_llamacpp(folder, options[0])
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 999 if device == "cuda" else 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        assert self.model, f"llama.cpp cannot load {path}"
        self.threads, self.context, self.rows = threads, None, 0

    def open(self, rows):
        """Makes a context for `rows` texts, unless the current one is for as many."""
        if self.rows == rows:
            return
        if self.context:
            self.api.llama_free(self.context)
            self.api.llama_batch_free(self.batch)
        self.context, self.rows = None, 0
        settings = self.api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = self.CONTEXT * rows
        settings.n_seq_max = rows
        settings.n_threads = settings.n_threads_batch = self.threads
        self.context = self.api.llama_init_from_model(self.model, settings)
        assert self.context, f"llama.cpp gives no context for {rows} texts; too little memory?"
        self.batch, self.rows = self.api.llama_batch_init(self.CONTEXT * rows, 0, 1), rows

    def sampler(self, greedy, seed):
        api = self.api
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        if greedy:
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_greedy())
            return chain
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_top_k(TOP_K))
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_top_p(TOP_P, 1))
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_temp(TEMPERATURE))
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_dist(seed))
        return chain

    def decode(self, columns, position):
        """Reads `columns`, a list of ids for each row, from `position` on. Returns the index of each row's logits."""
        batch, n, outputs = self.batch, 0, []
        for row, ids in enumerate(columns):
            for offset, token in enumerate(ids):
                batch.token[n], batch.pos[n], batch.n_seq_id[n] = token, position + offset, 1
                batch.seq_id[n][0] = row
                batch.logits[n] = offset == len(ids) - 1
                n += 1
            outputs.append(n - 1)
        batch.n_tokens = n
        code = self.api.llama_decode(self.context, batch)
        assert code == 0, f"llama_decode returned {code}"
        return outputs

    def generate(self, prompts, new_tokens, greedy):
        api = self.api
        self.open(len(prompts))
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        samplers = [self.sampler(greedy, seed) for seed in range(len(prompts))]
        outputs, position = self.decode(prompts, 0), len(prompts[0])
        texts = [[] for _ in prompts]
        for step in range(new_tokens):
            if step:
                outputs, position = self.decode([[row[-1]] for row in texts], position), position + 1
            for row, sampler, output in zip(texts, samplers, outputs, strict=True):
                row.append(api.llama_sampler_sample(sampler, self.context, output))
        for sampler in samplers:
            api.llama_sampler_free(sampler)
        return texts


class Bandwidth:
    """Measures how fast the device reads its memory. It stands among the programs, so that every round measures it."""

    REPEATS = 4  # the fastest counts

    def __init__(self, _folder, _options, threads, device):
        import torch

        torch.set_num_threads(threads)
        self.torch, self.device, self.version = torch, device, torch.__version__

    def read(self, megabytes: int) -> float:
        """Returns GB/s of reading a buffer of `megabytes` by the fastest of torch's reductions."""
        data = self.torch.ones(megabytes * 250_000, device=self.device)
        reductions = (data.amax, data.norm, data.view(self.torch.int64).sum, data.view(self.torch.int32).amax)
        seconds = min(self.seconds_of(reduction) for reduction in reductions)
        del data, reductions
        release(self.device)
        return megabytes / 1000 / seconds

    def seconds_of(self, reduction):
        """Returns the seconds of one call. On CUDA two events enclose many calls, and nothing waits between them."""
        reads, times = 20 if self.device == "cuda" else 1, []
        for _ in range(self.REPEATS):
            clock = Clock(self.device)
            for _ in range(reads):
                reduction()
            times.append(clock.seconds() / reads)
        return min(times)


PROGRAMS = {
    "ours": Ours,
    "transformers": Transformers,
    "ctranslate2": CTranslate2,
    "openvino": OpenVINO,
    "llamacpp": LlamaCpp,
    "nanogpt": NanoGPT,
    "bandwidth": Bandwidth,
}


def load(name: str, folder: Path, threads: int, device: str):
    """Returns the program that `name` stands for: "openvino:int8", "nanogpt=PATH", "ours:bf16:eager"."""
    kind, _, rest = name.partition("=") if "=" in name else name.partition(":")
    options = [rest] if "=" in name else rest.split(":") if rest else []
    return PROGRAMS[kind](folder, options, threads, device)
