"""Which convolution a batch norm belongs to: the one whose output it reads, or the last one listed before it."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dist_defend.models.masked_norm import norm_names


@torch.no_grad()
def feeding(model: nn.Module, example: Tensor) -> tuple[Tensor, dict[str, str]]:
    """The output for ``example``; batch norm -> the convolution whose output it reads as it is, seen in that pass.

    A norm that reads a sum, or the output of a convolution that is called several times, is not in it. In eval mode
    nothing of the model changes.
    """
    made: dict[int, tuple[str, Tensor]] = {}  # id of a convolution's output -> its name; keeps the output alive
    fed: dict[str, str] = {}
    calls: dict[str, int] = {}

    def after_convolution(name: str) -> Any:
        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            made[id(output)] = name, output
            calls[name] = calls.get(name, 0) + 1

        return note

    def before_norm(name: str) -> Any:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if id(inputs[0]) in made:
                fed[name] = made[id(inputs[0])][0]

        return note

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(after_convolution(name)))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(before_norm(name)))
    output = model(example)
    for hook in hooks:
        hook.remove()
    return output, {norm: conv for norm, conv in fed.items() if calls[conv] == 1}


def pair_norms(
    net: nn.Module, example: Tensor, pairing: Literal["published", "dataflow"], tell: Callable[[str], None]
) -> dict[str, str]:
    """Each batch norm with a scale that has a convolution -> it; tells of norms that read no convolution's output.

    published: the last convolution listed before the norm; dataflow: the one that feeds it. net: in eval mode.
    UserError for a network without such norms.
    """
    names, fed = norm_names(net), feeding(net, example)[1]
    pairs = preceding(net) if pairing == "published" else fed
    odd = [name for name in names if name not in fed or pairs.get(name) != fed[name]]
    if odd:
        how = "by the convolution listed before them, as published" if pairing == "published" else "not at all"
        tell(f"{len(odd)} batch norms, as {odd[0]}, do not read the output of one convolution: judged {how}")
    return {name: pairs[name] for name in names if name in pairs}


def preceding(model: nn.Module) -> dict[str, str]:
    """Batch norm -> the last convolution before it in the order of the modules, if it has as many channels.

    That need not be the one that feeds it: in a network that normalises before it convolves it often is not.
    """
    pairs, last = {}, None
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            last = name, module.out_channels
        elif isinstance(module, nn.BatchNorm2d) and last is not None and last[1] == module.num_features:
            pairs[name] = last[0]
    return pairs
