"""What is trained: which modules of a layer get an adapter, or all of it.

Apart from the adapters, whose library takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Sequence

from lopt_lite.checkpoints.matrices import matrices_besides
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.devices import backend, choose_device
from lopt_lite.errors import SettingsError
from lopt_lite.residency.shapes import Tuning
from lopt_lite.settings import TrainSettings
from lopt_lite.training.block_plan import Block
from lopt_lite.training.full import has_eight_bit_moments
from lopt_lite.training.peft_limits import refused_by_peft


def target_names(skeleton: Skeleton, index: int, settings: TrainSettings) -> list[str]:
    """Names within layer ``index`` of the modules that get an adapter.

    Raises
    ------
    SettingsError
        ``--lora-targets`` names a module that no layer has, or that PEFT would not adapt.
    """
    adaptable = _adaptable(skeleton, index)
    if not settings.target_names:
        return adaptable
    wanted = settings.target_names
    everywhere = {n for i in range(skeleton.layer_count) for n in _adaptable(skeleton, i)}
    for name in wanted:
        if not any(_is_called(n, name) for n in everywhere):
            choices = sorted({n.rpartition(".")[2] for n in everywhere})
            is_refused = name.rpartition(".")[2] in refused_by_peft(skeleton)
            why = "which PEFT would not load in {}" if is_refused else "which no layer of {} has"
            raise SettingsError(
                f"--lora-targets names {name!r}, {why.format(skeleton.architecture)}",
                expected=f"all-linear, or some of {', '.join(choices)}",
            )
    return [n for n in adaptable if any(_is_called(n, name) for name in wanted)]


def without_adapter(skeleton: Skeleton, settings: TrainSettings, blocks: Sequence[Block]) -> list[str]:
    """What the user should know of matrices in the trained layers that get no adapter though all were to get one."""
    # Who names modules has chosen what is trained, and knows.
    if settings.tune != "lora" or settings.target_names:
        return []
    trained = [index for block in blocks if block.objective != "none" for index in range(block.first, block.end)]
    remarks = []
    refused = sorted(refused_by_peft(skeleton))
    if refused:
        names = ", ".join(refused)
        why = "PEFT, which loads the result, would not put it there"
        remarks.append(f"{names} of {skeleton.architecture} get no adapter: {why}")
    besides = matrices_besides(skeleton, trained, skeleton.adaptable_names)
    if besides:
        remarks.append(
            f"{', '.join(besides)} of the trained layers get no adapter and stay as they are: adapters go on plain "
            "linear layers only (--tune full trains everything in a layer)"
        )
    return remarks


def _adaptable(skeleton: Skeleton, index: int) -> list[str]:
    refused = refused_by_peft(skeleton)
    return [name for name in skeleton.adaptable_names(index) if name.rpartition(".")[2] not in refused]


def _is_called(full: str, name: str) -> bool:
    return full == name or full.endswith("." + name)


def tuning(skeleton: Skeleton, settings: TrainSettings) -> Tuning:
    """What is trained, for the memory plan."""
    device = choose_device(settings.device)
    fused_attention = backend(device).fuses_attention(skeleton.dtype)
    if settings.tune == "full":
        return Tuning(eight_bit=has_eight_bit_moments(settings, device), fused_attention=fused_attention)
    return Tuning(
        fused_attention=fused_attention,
        targets=lambda index: target_names(skeleton, index, settings),
        rank=settings.lora_r,
        dropout=settings.lora_dropout > 0,
    )
