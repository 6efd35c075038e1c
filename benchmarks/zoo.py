"""What deriving a spec makes of networks that nobody here wrote: torchvision's, one of each family of timm, and small
ones of Hugging Face's transformers, as far as these are installed.

    python -m benchmarks.zoo --out zoo.md
    python -m benchmarks.zoo timm:levit_128s transformers:llama

Every network is built with random weights, derived, and checked in float64, in a process of its own. A line each:

    right     a spec that passed the check. moved: of 100 numbers in its tensors, how many lie in one whose units move;
              fixed: the first layer whose units can't move, and why.
    refused   a ValueError, which says why.
    fault     anything else: no such line should be there.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models import segmentation, video

from merging.permutation import derive_spec
from storage.files import save_text

SIZES = ("test", "femto", "atto", "pico", "nano", "xxt", "xt", "xxs", "zepto", "tiny", "micro", "mini", "xs", "small")
# What transformers' families take, by the name of their config: text, images, speech.
TEXT = """albert bart bert big_bird bloom camembert convbert ctrl deberta deberta-v2 distilbert electra ernie falcon
    fnet funnel gemma gemma2 gemma3_text glm gpt2 gpt_bigcode gpt_neo gpt_neox gptj granite helium llama longformer
    mamba mamba2 mistral mixtral mobilebert mpt mpnet nemotron nystromformer olmo olmo2 opt persimmon phi phi3
    qwen2 qwen2_moe qwen3 qwen3_moe rembert roberta roformer rwkv squeezebert stablelm starcoder2 t5 umt5 xglm
    xlm xlm-roberta xlnet yoso"""
IMAGES = """beit bit convnext convnextv2 cvt data2vec-vision deit dinov2 dinov2_with_registers dinov3_vit efficientnet
    focalnet hiera ijepa levit mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 poolformer pvt pvt_v2 regnet
    resnet segformer swiftformer swin swinv2 vit vit_mae vit_msn"""
SPEECH = "hubert unispeech wav2vec2 wavlm"
SMALL = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "emb_dim": 32, "embedding_size": 16,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "kv_channels": 8,
    "intermediate_size": 48, "ffn_dim": 48, "d_ff": 48, "n_inner": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "hidden_dim": 48, "ffn_hidden_size": 48, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "vocab_size": 99, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attention_types": [[["global", "local"], 1]],
    "mamba_d_state": 8, "state_size": 8, "rotary_dim": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A network: its name, and what builds it with an example of its inputs."""

    name: str
    build: Callable[[], tuple[nn.Module, Any]]


def of_torchvision(most: float) -> Iterator[Case]:
    """Its classifiers, segmentation and video networks of at most so many million parameters."""
    for name in torchvision.models.list_models():
        if name.startswith("raft") or "rcnn" in name or name.startswith(("fcos", "retinanet", "ssd", "quantized")):
            continue
        weights = torchvision.models.get_model_weights(name).DEFAULT
        if weights.meta["num_params"] <= most * 1e6:
            yield Case(f"torchvision:{name}", partial(_torchvision, name))


def _torchvision(name: str) -> tuple[nn.Module, Any]:
    kwargs: dict[str, Any] = {"weights": None}
    if name in torchvision.models.list_models(segmentation):
        kwargs["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        kwargs["init_weights"] = False
    model = torchvision.models.get_model(name, **kwargs)
    if name in torchvision.models.list_models(video):
        side = 224 if name.startswith(("mvit", "s3d")) else 112
        return model, torch.zeros(1, 3, 16, side, side)
    side = getattr(model, "image_size", None) or (299 if name == "inception_v3" else 224 if "maxvit" in name else 64)
    return model, torch.zeros(1, 3, side, side)


def of_timm(most: float) -> Iterator[Case]:
    """A small one of each of its families."""
    timm = importlib.import_module("timm")
    for family in timm.list_modules():
        names = timm.list_models(module=family)
        if names:
            yield Case(f"timm:{min(names, key=_size)}", partial(_timm, min(names, key=_size)))


def _size(name: str) -> tuple[int, int, str]:
    """The smaller, the earlier, as far as the names of timm say."""
    words = name.replace("-", "_").split("_")
    sizes = (n for n, size in enumerate(SIZES) for word in words if word.startswith(size))
    return min(sizes, default=len(SIZES)), len(name), name


def _timm(name: str) -> tuple[nn.Module, Any]:
    model = importlib.import_module("timm").create_model(name, pretrained=False)
    channels, height, width = model.pretrained_cfg["input_size"]
    small = torch.zeros(1, channels, min(height, 128), min(width, 128))
    try:
        with torch.no_grad():
            model.eval()(small)
    except Exception:  # it takes its own size only
        return model, torch.zeros(1, channels, height, width)
    return model, small


def of_transformers(most: float) -> Iterator[Case]:
    """Two narrow layers of each family."""
    for kind, families in (("text", TEXT), ("images", IMAGES), ("speech", SPEECH)):
        for family in families.split():
            yield Case(f"transformers:{family}", partial(_transformers, family, kind))


def _transformers(family: str, kind: str) -> tuple[nn.Module, Any]:
    transformers = importlib.import_module("transformers")
    config = transformers.AutoConfig.for_model(family)
    if kind == "text":
        small = {key: value for key, value in SMALL.items() if hasattr(config, key)}
        for left_out in (None, *small):  # not every combination is one
            with suppress(Exception):
                config = transformers.AutoConfig.for_model(family, **{k: v for k, v in small.items() if k != left_out})
                break
    config.use_cache = False
    model = transformers.AutoModel.from_config(config)
    if kind == "text":
        tokens = torch.arange(24).reshape(2, 12) + 3
        return model, {"input_ids": tokens, **({"decoder_input_ids": tokens} if config.is_encoder_decoder else {})}
    if kind == "speech":
        return model, torch.zeros(1, 4000)
    side = getattr(config, "image_size", None) or 64
    side = side if isinstance(side, int) else side[0]
    return model, {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), side, side)}


LIBRARIES = {"torchvision": of_torchvision, "timm": of_timm, "transformers": of_transformers}


def look(case: Case, answer: Connection) -> None:
    """In a process of its own: sends (result, moved, remark)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        model, example = case.build()
    except Exception as error:  # another version of the library
        answer.send(("not built", "", _short(f"{type(error).__name__}: {error}")))
        return
    try:
        spec = derive_spec(model, example)
    except ValueError as error:
        answer.send(("refused", "", _short(str(error))))
    except Exception as error:
        answer.send(("fault", "", _short(f"{type(error).__name__}: {error}")))
    else:
        numbers = {name: t.numel() for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
        moved = sum(n for name, n in numbers.items() if spec.of_tensor[name]) / max(sum(numbers.values()), 1)
        stuck = {name: why for name, why in spec.stuck.items() if why != "picked by number"}  # rows of a vocabulary
        layer, why = next(iter(stuck.items()), ("", ""))
        answer.send(("right", f"{100 * moved:.0f}", _short(f"{layer}: {why}" if layer else "")))


def _short(text: str, most: int = 220) -> str:
    text = " ".join(text.replace("|", "/").split())
    return text if len(text) <= most else text[:most] + " ..."


def judge(case: Case, limit: float) -> tuple[str, str, str, float]:
    """(result, moved, remark, seconds)."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=look, args=(case, theirs))
    began = time.perf_counter()
    process.start()
    theirs.close()
    found = ("fault", "", f"nothing after {limit:g} s")
    try:
        if ours.poll(limit):
            found = ours.recv()
    except EOFError:
        found = ("fault", "", "its process ended")
    process.kill()
    process.join()
    return *found, time.perf_counter() - began


def table(found: Mapping[str, tuple[str, str, str, float]]) -> str:
    """Markdown: a summary by library, then a line for each network."""
    counts = {library: Counter(row[0] for name, row in found.items() if name.startswith(library + ":"))
              for library in LIBRARIES}
    kinds = ("right", "refused", "fault", "not built")
    lines = ["| | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    lines += [f"| {library} | {' | '.join(str(count[kind]) for kind in kinds)} |"
              for library, count in counts.items() if count]
    lines += ["", "| network | | moved (%) | seconds | fixed, or refused because |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {result} | {moved} | {seconds:.1f} | {remark} |"
              for name, (result, moved, remark, seconds) in found.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("networks", nargs="*", help="only these, or all of a library (timm), as far as it is installed")
    parser.add_argument("--out", default="", help="a Markdown file for the table")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a network")
    parser.add_argument("--most", type=float, default=60, help="largest of torchvision's, in million parameters")
    options = parser.parse_args()
    wanted = options.networks or list(LIBRARIES)
    found: dict[str, tuple[str, str, str, float]] = {}
    for library, cases in LIBRARIES.items():
        if not any(name.partition(":")[0] == library for name in wanted):
            continue
        if importlib.util.find_spec(library) is None:
            print(f"{library} is not installed: left out")
            continue
        importlib.import_module(library)  # once, not in each process
        for case in cases(options.most):
            if library in wanted or case.name in wanted:
                found[case.name] = judge(case, options.limit)
                result, moved, remark, seconds = found[case.name]
                print(f"{case.name:48s} {result:9s} {moved:>3s} {seconds:6.1f}  {remark}", flush=True)
                if options.out:
                    save_text(Path(options.out), table(found))
    print("\n" + table(found).partition("\n\n")[0])


if __name__ == "__main__":
    main()
