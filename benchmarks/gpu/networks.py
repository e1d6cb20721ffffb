# SPDX-License-Identifier: Apache-2.0
"""InternImage-T with UPerNet in PyTorch on the GPU: what its head, its end and its backbone cost in float16.

Each is timed as a CUDA graph, channels last, at 512x512. That is PyTorch's choice of kernels and not TensorRT's: it
tells what the forms of the head cost against each other, and how many kernels a backbone is made of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rows import OK, WRONG, Row
from task import Options, Task

if TYPE_CHECKING:
    import torch
    from torch import nn

    from internimage_deploy.exporter.models import SegmentorConfig

MODEL = "upernet_internimage_t_512_160k_ade20k"
SIZE = (512, 512)
DEVICE, DTYPE = "cuda", "float16"
BATCHES = (1, 8)
# Rewrites of the head that are left out, by the name of the form.
FORMS: Mapping[str, tuple[str, ...]] = {
    "plain": ("upernet-fusion", "pyramid-pooling"),
    "fusion rewritten": ("pyramid-pooling",),
    "fusion and pooling rewritten": (),
}
WORST = 0.02  # of the largest logit, between float16 and float32


def tasks(options: Options) -> Iterator[Task]:
    """The forms of the head, the end, the backbone, the whole."""
    for batch in BATCHES:
        for form in FORMS:
            yield Task(f"head, {form}, b{batch}", functools.partial(head, form, batch))
    for batch in BATCHES:
        yield Task(f"upsampling and argmax, b{batch}", functools.partial(upsample_argmax, batch))
    for batch in BATCHES:
        yield Task(f"backbone, b{batch}", functools.partial(backbone, batch))
        yield Task(f"whole network, b{batch}", functools.partial(whole, batch))


def measure(call: Callable[[], object]) -> Row:
    """Milliseconds of `call` in a CUDA graph, and the kernels that it launches."""
    import torch
    from cuda_timer import CudaTimer

    torch.backends.cudnn.benchmark = True  # the fastest convolution for each shape, as an engine's builder picks it
    timing = CudaTimer().time([call], launches=5, replays=20)
    return {"median_ms": timing.median_ms, "p95_ms": timing.p95_ms, **kernels(call)}


def kernels(call: Callable[[], object]) -> Row:
    """Number and total time of the kernels of one call, and those that take most of it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    launched = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    by_name: dict[str, list[float]] = {}
    for event in launched:
        by_name.setdefault(event.name, []).append(float(event.time_range.elapsed_us()))
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:12]
    return {
        "kernels": len(launched),
        "kernels_ms": sum(map(sum, by_name.values())) / 1e3,
        "longest": [{"name": name[:120], "count": len(us), "us": round(sum(us), 1)} for name, us in longest],
    }


def config() -> SegmentorConfig:
    """The model that is measured."""
    from internimage_deploy.exporter.presets import PRESETS

    return PRESETS[MODEL].config


@functools.cache
def segmentor(form: str) -> nn.Module:
    """The model with random weights, on the CPU in float32, with the rewrites of an export in that form."""
    from internimage_deploy.exporter import rewrites
    from internimage_deploy.exporter.models import build_random
    from internimage_deploy.exporter.options import ExportOptions
    from internimage_deploy.exporter.rewrites import fusion

    # An export makes constants of these; here they would be computed in every call.
    if not hasattr(fusion.shifted_interpolation, "cache"):
        fusion.shifted_interpolation = _constant(fusion.shifted_interpolation)
    made = build_random(config(), 0)
    rewrites.apply(made, ExportOptions(size=SIZE, input="float", without=FORMS[form]))
    return made


def _constant(function: Callable[[int, int, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`function(source, target, like)`, computed once for each dtype and device of `like`."""
    known: dict[Any, torch.Tensor] = {}

    def cached(source: int, target: int, like: torch.Tensor) -> torch.Tensor:
        key = (source, target, like.dtype, like.device)
        if key not in known:
            known[key] = function(source, target, like)
        return known[key]

    cached.cache = known  # type: ignore[attr-defined]
    return cached


def on_device(module: nn.Module) -> nn.Module:
    """A copy of a module for the GPU."""
    import copy

    import torch

    moved = copy.deepcopy(module).to(DEVICE, getattr(torch, DTYPE))
    return moved.to(memory_format=torch.channels_last)


def features(batch: int) -> list[torch.Tensor]:
    """Random maps as the backbone gives them to the head: (N, C * 2**i, H / 2**(i+2), W / 2**(i+2)), float32."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, config().backbone.channels << i, SIZE[0] >> (i + 2), SIZE[1] >> (i + 2)) for i in range(4)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def head(form: str, batch: int) -> Row:
    """One form of the head: time, and the difference from the plain head in float32."""
    import torch

    maps = features(batch)
    moved = [x.to(DEVICE, getattr(torch, DTYPE), memory_format=torch.channels_last) for x in maps]
    network = on_device(segmentor(form).decode_head)
    with torch.inference_mode():
        plain = segmentor("plain").decode_head
        with torch.backends.cudnn.flags(allow_tf32=False):
            expected = plain.to(DEVICE)([x[:1].to(DEVICE) for x in maps])
        error = float((network(moved)[:1].float() - expected).abs().max() / expected.abs().max())
        plain.to("cpu")
        found = measure(lambda: network(moved))
    return {"status": OK if error <= WORST else WRONG, "error": error, **found}


def upsample_argmax(batch: int) -> Row:
    """Logits (N, 150, H/4, W/4) to labels (N, H, W) by upsampling all logits first."""
    import torch
    from kernel_times import bench
    from prediction import Work, predict

    from internimage_deploy.exporter.network import Labels

    classes, (height, width) = 150, SIZE
    shape = (batch, classes, height // 4, width // 4)
    logits = torch.randn(shape, device=DEVICE).to(getattr(torch, DTYPE))
    labels = Labels(classes)
    with torch.inference_mode():
        found = measure(lambda: labels(logits))
    full = 2 * batch * classes * height * width
    return {**found, **predict(Work(full // 16 + 2 * full + batch * height * width), bench().gpu)}


def backbone(batch: int) -> Row:
    """The backbone with the plugin's kernel in every DCNv3 layer."""
    return _network(with_plugin_kernel(on_device(segmentor("plain").backbone)), batch)


def whole(batch: int) -> Row:
    """Backbone and rewritten head: normalised images to logits."""
    return _network(with_plugin_kernel(on_device(segmentor("fusion and pooling rewritten"))), batch)


def _network(network: nn.Module, batch: int) -> Row:
    import torch

    images = torch.randn(batch, 3, *SIZE, device=DEVICE).to(getattr(torch, DTYPE))
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        output = network(images)
        outputs: Sequence[torch.Tensor] = output if isinstance(output, list) else [output]
        finite = all(bool(x.isfinite().all()) for x in outputs)
        return {"status": OK if finite else WRONG, "finite": finite, **measure(lambda: network(images))}


def with_plugin_kernel(network: nn.Module) -> nn.Module:
    """Let every DCNv3 layer of `network` call the plugin's kernel."""
    from internimage_deploy.exporter.models import DCNv3

    for layer in network.modules():
        if isinstance(layer, DCNv3):
            layer.operator = plugin_dcnv3
    return network


def plugin_dcnv3(
    input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, *, group: int, mask_softmax: bool, **settings: Any
) -> torch.Tensor:
    """DCNv3 by the plugin's kernel; arguments and result as `exporter.models.dcnv3.dcnv3`.

    Offsets and mask may be parts of one tensor: the kernel takes strides.
    """
    import torch
    from correctness import enqueue
    from dcnv3_operator import Dcnv3, Dcnv3Case

    batch, height, width, channels = input.shape
    case = Dcnv3Case("layer", batch, height, width, group, channels // group, softmax=mask_softmax, **settings)
    operands = {"input": input.contiguous(), "offset": offset, "mask": mask}
    operands["output"] = torch.empty(batch, *case.out_size, channels, dtype=input.dtype, device=input.device)
    params = Dcnv3().params(case, operands)
    enqueue(Dcnv3(), params, str(input.dtype).removeprefix("torch."), 0)
    return operands["output"]
