"""The repeated blocks of a network: what is sharded, recomputed and compiled one by one."""

from torch import nn


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Members of every sequence of alike, composite modules: a ResNet's residual blocks, a ViT's layers.

    The innermost such sequences count, none lies within another. Empty for a plain chain of layers (VGG).
    """
    found: list[nn.Module] = []
    for child in module.children():
        inner = repeated_blocks(child)
        if inner:
            found += inner
        elif isinstance(module, nn.Sequential | nn.ModuleList) and _are_blocks(module):
            found.append(child)
    return found


def _are_blocks(sequence: nn.Sequential | nn.ModuleList) -> bool:
    members = list(sequence.children())
    is_alike = len({type(member) for member in members}) == 1
    return is_alike and not isinstance(members[0], nn.Sequential) and any(True for _ in members[0].children())
